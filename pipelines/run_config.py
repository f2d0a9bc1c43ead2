"""What every command's configuration is built from."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
