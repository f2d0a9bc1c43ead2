"""Every error that this project raises on purpose.

    MdmError
    ├── ConfigError        bad configuration or input, found before any work began   exit code 2
    └── WorkError          the work itself failed after it had begun                 exit code 1
        └── CheckpointError    a checkpoint is damaged, or does not fit the network

Each message says what was wrong, what was got, what was wanted and how to mend it. Anything else that
reaches the command line is a fault of this project and keeps its traceback.
"""


class MdmError(Exception):
    """A failure with a message written for the user."""


class ConfigError(MdmError):
    """Bad configuration or input, found before any work began (exit code 2)."""


class WorkError(MdmError):
    """Work that had begun has failed (exit code 1)."""


class CheckpointError(WorkError):
    """A checkpoint is damaged, or does not fit the network it is loaded into."""
