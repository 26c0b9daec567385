"""Turns a typed document into the structural schema of a CustomResourceDefinition (control speed, pure).

Kubernetes wants no $ref, no nulls, no additionalProperties beside properties, and defaults that are valid as they stand: a
default of {} is validated before the defaults inside it are filled in, so parents carry their whole default.

Must not know: which kinds there are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Json = dict[str, Any]

_KEPT = (
    "description",
    "enum",
    "maxItems",
    "minItems",
    "maxLength",
    "minLength",
    "maximum",
    "minimum",
    "pattern",
    "format",
    "maxProperties",
)


def structural_schema(model: type[BaseModel]) -> Json:
    """The structural OpenAPI v3 schema of ``model``; descriptions on every field.

    Raises:
        ValueError: a part of the model has no structural form.
    """
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _with_defaults(_convert(raw, raw.get("$defs", {}), model.__name__), model)


def _convert(node: Json, definitions: Json, where: str) -> Json:
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        merged = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        return _convert(merged, definitions, where)
    if "anyOf" in node:
        return _convert_union(node, definitions, where)
    out: Json = {key: node[key] for key in _KEPT if key in node}
    if "const" in node:
        out["enum"] = [node["const"]]
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node:
            out |= {limit: node[bound], bound: True}
    if "default" in node and node["default"] is not None:
        out["default"] = node["default"]
    kind = node.get("type") or ("string" if isinstance(out.get("enum", [None])[0], str) else None)
    if kind is None:
        raise ValueError(f"{where}: no structural form for {sorted(node)}")
    out["type"] = kind
    if kind == "array":
        out["items"] = _convert(node["items"], definitions, f"{where}[]")
    if kind == "object" and "properties" in node:
        out["properties"] = {name: _convert(value, definitions, f"{where}.{name}") for name, value in node["properties"].items()}
        if node.get("required"):
            out["required"] = sorted(node["required"])
    elif kind == "object" and isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions, f"{where}{{}}")
    return out


def _convert_union(node: Json, definitions: Json, where: str) -> Json:
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    options = [option for option in node["anyOf"] if option.get("type") != "null"]
    if len(options) == 1:
        return _convert({**options[0], **rest}, definitions, where)
    if {option.get("type", "string") for option in options} == {"integer", "string"}:
        out: Json = {key: rest[key] for key in ("description", "default") if key in rest}
        return out | {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    raise ValueError(f"{where}: no structural form for a union of {options}")


def _with_defaults(schema: Json, model: type[BaseModel]) -> Json:
    """Add the defaults that come from factories, which JSON schema leaves out, here and below."""
    for name, field in model.model_fields.items():
        alias = field.alias or name
        property_ = schema.get("properties", {}).get(alias)
        if property_ is None:
            continue
        if field.default_factory is not None and property_["type"] == "object" and "properties" in property_:
            default = field.get_default(call_default_factory=True, validated_data={})
            if isinstance(default, BaseModel):
                property_["default"] = default.model_dump(mode="json", by_alias=True, exclude_none=True)
        elif isinstance(field.default, (list, tuple)) and not field.default:
            property_.pop("default", None)
        for inner in _models_of(field.annotation):
            _with_defaults(property_.get("items", property_), inner)
    return schema


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_of(part)]


def apply_defaults(schema: Json, value: Any) -> Any:
    """What the API server stores for ``value``: the schema's defaults filled in, top down."""
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for name, property_ in schema["properties"].items():
            if name not in filled and "default" in property_:
                filled[name] = property_["default"]
            if name in filled:
                filled[name] = apply_defaults(property_, filled[name])
        return filled
    if isinstance(value, list) and "items" in schema:
        return [apply_defaults(schema["items"], item) for item in value]
    return value
