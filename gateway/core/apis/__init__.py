"""The APIs whose answers are cached, one file each."""

from gateway.core.apis.base import Api, Assembler, RequestProblem
from gateway.core.apis.chat import CHAT
from gateway.core.apis.completions import COMPLETIONS

__all__ = ["APIS", "CHAT", "COMPLETIONS", "Api", "Assembler", "RequestProblem"]

APIS: dict[str, Api] = {api.name: api for api in (CHAT, COMPLETIONS)}
