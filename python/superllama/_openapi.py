"""The control plane's routes as an OpenAPI document: what is asked, what is answered.

python -m superllama._openapi        write openapi.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from . import __version__
from ._metrics import Count, ExpertCounts, Metrics

OPENAPI_FILE = Path(__file__).with_name("openapi.json")

Size = Annotated[
    Count | str, Field(description='a number of bytes, or a text: "8GiB", "512MiB", "60%", "auto"', examples=["8GiB"])
]


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():  # what is not named stays as it is, or is absent
        field.pop("default", None)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_defaults)


class Layer(_Model):
    """A layer, and where it is."""

    index: Count
    tier: Literal["host", "device", "disk"]
    bytes: Count
    bytes_resident: Count
    loads: Count
    evictions: Count
    device: str | None


class Member(_Model):
    """A server of a router, and what it has of the memory that all of them share."""

    model: str
    pid: int
    lease_bytes: Count = Field(description="that it may use now")
    least_bytes: Count
    full_bytes: Count
    weight: Count = Field(description="of its share among those that are active")
    active: bool


class Pool(_Model):
    """The memory that the servers of a router share."""

    total_bytes: Count
    leased_bytes: Count
    members: list[Member]


class RouterStatus(_Model):
    """What a router says where no model is named."""

    version: str
    upstream_build: str
    state: Literal["ready"]
    router: Literal[True]
    pool: Pool


class Status(_Model):
    """What the server's memory is for."""

    version: str
    upstream_build: str
    state: Literal["ready", "degraded", "draining", "pausing", "paused", "released", "resuming"]
    requests_in_flight: Count = Field(description="that run, or wait for a slot")
    reason: str = Field("", description="why a degraded server has no model")
    dynamic_layers: bool
    memory_used_bytes: Count
    layers: list[Layer]
    metrics: Metrics | None = Field(None, description="absent while the memory is given back")
    n_ctx: Count | None = Field(None, description="tokens that all sequences may hold together; absent as well")
    pool: Pool | None = Field(None, description="of a router's server")
    experts: ExpertCounts | None = Field(None, description="with ?experts=1; null where the model has none")


class Budgets(_Model):
    """What is named changes, all of it or nothing."""

    mem_budget: Size = "auto"
    vram_budget: Size | list[Size] = Field("auto", description="one for all devices, or one for each")
    model: str = Field("", description="of a router: whose")


class Failure(_Model):
    """Why it was refused."""

    code: int
    message: str
    type: str


class Refusal(_Model):
    """An answer that is an error, as those of all routes."""

    error: Failure


class Health(_Model):
    """Whether requests are taken."""

    status: str
    state: str = ""
    error: Failure | None = None


def document() -> dict[str, Any]:
    """The document."""
    kinds: list[type[BaseModel]] = [Status, RouterStatus, Budgets, Refusal, Health]
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "superllama-server: control plane",
            "version": __version__,
            "description": "Beside llama-server's own routes. With --api-key all but /health want the key.",
        },
        "paths": {
            "/health": {
                "get": {
                    "summary": "whether requests are taken",
                    "responses": {"200": _is("Health", "yes"), "503": _is("Health", "no, and why")},
                }
            },
            "/superllama": {
                "get": {
                    "summary": "memory, layers, counters; of a router without ?model=NAME: who has how much",
                    "parameters": [
                        {
                            "name": "experts",
                            "in": "query",
                            "description": "1: each expert too, how often it was chosen and where it is",
                            "schema": {"enum": ["0", "1"]},
                        }
                    ],
                    "responses": {
                        "200": _is("Status", "now"),
                        "401": _is("Refusal", "without the key"),
                        "403": _is("Refusal", "a page of another site asks"),
                    },
                }
            },
            "/superllama/budget": _change("change budgets while it serves", body=True),
            "/superllama/drain": _change("take no new requests"),
            "/superllama/pause": _change("take no new requests, then give the memory back"),
            "/superllama/resume": _change("serve again, with the conversations that there were"),
        },
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _is(kind: str, description: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{kind}"}
    if kind == "Status":
        schema = {"anyOf": [schema, {"$ref": "#/components/schemas/RouterStatus"}]}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _change(summary: str, body: bool = False) -> dict[str, Any]:
    responses = {
        "200": _is("Status", "it is so"),
        "202": _is("Status", "it will be, when what runs has ended"),
        "401": _is("Refusal", "without the key"),
        "403": _is("Refusal", "a page of another site asks"),
        "501": _is("Refusal", "this server cannot"),
    }
    if not body:
        return {"post": {"summary": summary, "responses": responses}}
    responses |= {"400": _is("Refusal", "it cannot be: nothing changes"), "503": _is("Refusal", "it is paused")}
    schema = {"$ref": "#/components/schemas/Budgets"}
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": content, "responses": responses}}


def document_text() -> str:
    """What openapi.json contains."""
    return json.dumps(document(), indent=2) + "\n"


if __name__ == "__main__":
    OPENAPI_FILE.write_text(document_text())
