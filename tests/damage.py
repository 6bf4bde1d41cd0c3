"""Ways in which a value that was read from JSON can be wrong."""

import copy
from collections.abc import Iterator
from typing import Any

WRONG = (None, True, -1, 10**19, 10**400, 0.5, "", "x\0/../y", [], [[]], {}, {"x": {}})


def damaged(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields copies of a value, each with one part replaced or removed, and where that is."""
    for place in _places(value):
        for wrong in (*WRONG, ...):
            changed = copy.deepcopy(value)
            *path, last = place
            inner = changed
            for key in path:
                inner = inner[key]
            if wrong is ...:
                del inner[last]
            else:
                inner[last] = copy.deepcopy(wrong)
            if changed != value:
                yield f"{place}: {str(wrong)[:20]}", changed


def _places(value: Any) -> Iterator[list[Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield [key]
        if isinstance(inner, dict | list):
            yield from ([key, *place] for place in _places(inner))
