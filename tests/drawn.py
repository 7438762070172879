"""Settings that name a function of a table, drawn within the bounds of its options.

So a contract holds for what somebody adds to a table tomorrow, and for more than its defaults.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainables.named import Choice

MOST_DRAWS = 2_000
REACH = {"integer": 8, "number": 2.0}  # above the lowest, so that what is drawn is quick to try

Rule = Mapping[str, Any]  # of a JSON schema


def drawn(setting: Any, name: str, count: int = 5) -> list[Choice]:
    """Different settings of this type that name `name`; the first has all its defaults.

    Free text that has a default keeps it: no other text is known to mean anything.
    """
    adapter, options, of_ref = _read(setting, name)
    chance = random.Random(name)
    found: list[Choice] = []
    for draw in range(MOST_DRAWS):
        given = {option: rule["const"] for option, rule in options.items() if "const" in rule}
        for option, rule in options.items():
            kinds = [rule, *rule.get("anyOf", ())]
            is_text = any(kind.get("type") == "string" and "enum" not in kind for kind in kinds)
            is_left_out = "default" in rule and (draw == 0 or is_text or chance.random() < 0.5)
            if option not in given and not is_left_out:
                given[option] = _draw(rule, of_ref, chance)
        choice = _accepted(adapter, given)
        if choice is not None and choice not in found:
            found.append(choice)
        if len(found) == count:
            break
    assert found, f"{MOST_DRAWS} draws, and no setting of {name} that is allowed"
    return found


def varied(setting: Any, given: Mapping[str, Any], name: str) -> Iterator[tuple[str, Choice]]:
    """The same setting with one option changed: up to six other values of each option."""
    adapter, options, of_ref = _read(setting, name)
    chance = random.Random(name)
    for option, rule in options.items():
        found = [_accepted(adapter, given)]
        for _ in range(20):
            if "const" in rule or len(found) == 7:
                break
            choice = _accepted(adapter, {**given, option: _draw(rule, of_ref, chance)})
            if choice is not None and choice not in found:
                found.append(choice)
                yield option, choice


def _accepted(adapter: TypeAdapter[Choice], given: Mapping[str, Any]) -> Choice | None:
    """What a study file that says so would be read as; None if it would be refused."""
    try:
        return adapter.validate_json(json.dumps(given), strict=True)
    except ValidationError:
        return None


def _read(setting: Any, name: str) -> tuple[TypeAdapter[Choice], Mapping[str, Rule], Rule]:
    """What reads such settings, the options of `name`, and what references stand for."""
    adapter = TypeAdapter(setting)
    schema = adapter.json_schema()
    of_ref = {f"#/$defs/{key}": rule for key, rule in schema.get("$defs", {}).items()}
    for rule in [schema, *(of_ref[each["$ref"]] for each in schema.get("oneOf", []))]:
        options = rule.get("properties", {})
        if any(option.get("const") == name for option in options.values()):
            return adapter, options, of_ref
    raise AssertionError(f"no setting names {name}")


def _draw(rule: Rule, of_ref: Rule, chance: random.Random) -> Any:
    if "$ref" in rule:
        rule = of_ref[rule["$ref"]]
    if "const" in rule:
        return rule["const"]
    if "enum" in rule:
        return chance.choice(rule["enum"])
    several = rule.get("anyOf") or rule.get("oneOf")
    if several:
        return _draw(chance.choice(several), of_ref, chance)
    match rule["type"]:
        case "null":
            return None
        case "boolean":
            return chance.random() < 0.5
        case "integer" | "number":
            return _number(rule, chance)
        case "string":
            return chance.choice("abc")
        case "array":
            shortest = rule.get("minItems", 0)
            parts = rule.get("prefixItems")
            if parts is None:
                length = chance.randint(shortest, rule.get("maxItems", shortest + 2))
                parts = [rule["items"]] * length
            return [_draw(part, of_ref, chance) for part in parts]
        case "object":
            parts = rule.get("properties", {})
            return {key: _draw(part, of_ref, chance) for key, part in parts.items()}
    raise AssertionError(f"nothing can be drawn of {rule}")


def _number(rule: Rule, chance: random.Random) -> float:
    """A number near the lower bound, often a bound itself."""
    reach = REACH[rule["type"]]
    low = rule.get("minimum", rule.get("exclusiveMinimum", -reach / 2))
    high = min(low + reach, rule.get("maximum", rule.get("exclusiveMaximum", low + reach)))
    share = chance.choice([0, 1, *(chance.random() for _ in range(4))])
    value = low + share * (high - low)
    return round(value) if rule["type"] == "integer" else round(value, 2)
