"""The OpenAPI 3.1 document, generated from the operations and the types that validate requests."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from collab_service.gateway import forms
from collab_service.gateway.handlers import JSON, Handlers
from collab_service.gateway.operations import OPERATIONS, Operation

_PATH_PARAMETERS: dict[str, tuple[Any, str]] = {
    "id": (forms.Id, "The session's number."),
    "user_id": (forms.Name, "The user."),
}
_ALWAYS = (400, 408, 429, 431, 500, 503)
"""Statuses of errors that every call can have."""


def document(version: str) -> dict[str, Any]:
    """Return the document."""
    types = [forms.ErrorAnswer, *_body_types()]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    references = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = operation.path.replace("{user_id:text}", "{userId}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "collab-service",
            "version": version,
            "description": "Collaboration sessions as durable, ordered, append-only event logs.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _body_types() -> Iterable[Any]:
    for operation in OPERATIONS:
        if operation.body is not None:
            yield operation.body
        yield from (kind for _, kind in operation.answers.values() if kind is not None)


def _operation(operation: Operation, references: dict[str, Any]) -> dict[str, Any]:
    error = {JSON: {"schema": references[repr(forms.ErrorAnswer)]}}
    responses: dict[str, Any] = {}
    for status, (description, kind) in operation.answers.items():
        content: dict[str, Any] = {} if kind is None else {JSON: {"schema": references[repr(kind)]}}
        for media_type, what in operation.other_forms.items():
            content[media_type] = {"schema": {"type": "string", "description": what}}
        responses[str(status)] = {"description": description} | ({"content": content} if content else {})
    for status in sorted({*_ALWAYS, *operation.errors}):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    summary = (getattr(Handlers, operation.handler).__doc__ or "").partition("\n")[0]
    described: dict[str, Any] = {
        "operationId": operation.handler,
        "summary": summary,
        "parameters": list(_parameters(operation)),
        "responses": responses,
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": references[repr(operation.body)]}}}
    return described


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for name in re.findall(r"{(\w+)[}:]", operation.path):
        kind, description = _PATH_PARAMETERS[name]
        shown = "userId" if name == "user_id" else name
        yield _parameter("path", shown, msgspec.json.schema(kind), required=True, description=description)
    schemas = msgspec.json.schema_components([operation.query])[1][operation.query.__name__]["properties"]
    for name, field in forms.fields_of(operation.query).items():
        schema = dict(schemas[name])
        schema.pop("default", None)
        if "anyOf" in schema:  # null cannot be written in a query
            (schema,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
        yield _parameter("query", name, schema, required=field.required)
    for name, description in operation.headers.items():
        yield _parameter("header", name, {"type": "string"}, required=False, description=description)


def _parameter(
    where: str, name: str, schema: dict[str, Any], *, required: bool, description: str = ""
) -> dict[str, Any]:
    description = schema.pop("description", "") or description
    return {"name": name, "in": where, "required": required, "description": description, "schema": schema}
