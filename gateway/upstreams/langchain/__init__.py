"""Any LangChain chat model, or LLM, as an upstream: named by import path, asked by ``astream``.

LangChain is imported when such an upstream is constructed, and never before: it costs half a second.
"""

from gateway.upstreams.langchain.upstream import LangChainUpstream

__all__ = ["LangChainUpstream"]
