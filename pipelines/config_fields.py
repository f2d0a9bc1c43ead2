"""What the fields of a configuration class hold: single values, sections, or lists of sections."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def members(annotation: object) -> tuple[Any, ...]:
    """The types that a field may have, with unions and `Annotated` taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in members(member))
    return (annotation,)


def section_class(annotation: object) -> type[BaseModel] | None:
    """The configuration class that a field holds, alone or beside None."""
    classes = [kind for kind in members(annotation) if kind is not type(None)]
    if len(classes) == 1 and isinstance(classes[0], type) and issubclass(classes[0], BaseModel):
        return classes[0]
    return None


def item_class(annotation: object) -> type[BaseModel] | None:
    """The configuration class of the items of a field that holds a list of sections."""
    if get_origin(annotation) in (tuple, list, Sequence):
        return section_class(get_args(annotation)[0])
    return None
