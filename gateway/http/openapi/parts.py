"""What the document is put together from: schemas, references, and operations that answer with JSON."""

from typing import Any

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}


def string(text: str, **rules: Any) -> Json:
    return {"type": "string", "description": text, **rules}


def or_null(kind: str, text: str, **rules: Any) -> Json:
    return {"type": [kind, "null"], "description": text, **rules}


def array_of(items: Json) -> Json:
    return {"type": "array", "items": items}


def object_of(properties: Json, *required: str) -> Json:
    """An object that may have other members as well."""
    found = {"type": "object", "properties": properties, "additionalProperties": True}
    return found | ({"required": list(required)} if required else {})


def whole_object_of(properties: Json) -> Json:
    """The same, none of whose members is ever missing."""
    return object_of(properties, *properties)


def ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def schema_ref(name: str) -> Json:
    return ref("schemas", name)


def header_refs(*names: str) -> Json:
    return {name: ref("headers", name) for name in names}


def parameter(name: str, where: str, schema: Json) -> Json:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def json_content(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def operation(name: str, summary: str, answer: str, *errors: int) -> Json:
    """One that takes no body; ``answer`` is the name of a schema."""
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [ref("parameters", "RequestId")],
        "responses": {
            "200": {
                "description": summary,
                "headers": header_refs("Cache-Status", "X-Request-Id"),
                "content": json_content(schema_ref(answer)),
            },
            **error_refs(*errors),
        },
    }


def error_refs(*statuses: int) -> Json:
    return {str(status): ref("responses", str(status)) for status in statuses}


def error(text: str, *headers: str) -> Json:
    return {
        "description": text,
        "headers": header_refs("Cache-Status", "X-Request-Id", *headers),
        "content": json_content(schema_ref("Error")),
    }
