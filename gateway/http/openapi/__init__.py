"""What is served, as an OpenAPI 3.1 document. It describes the gateway: what only the model reads is passed on as it is."""

from gateway.http.openapi.document import MetricsKind, document, operators_document

__all__ = ["MetricsKind", "document", "operators_document"]
