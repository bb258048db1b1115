"""Every error qmoe raises on purpose. The message says what, what was expected, what was found."""


class QmoeError(Exception):
    """Base of all qmoe errors; the CLI prints its message and exits with status 1."""


class ConfigError(QmoeError):
    """A setting that cannot work, alone or with this model."""


class CheckpointError(QmoeError):
    """A model folder that is missing, incomplete, damaged or holds NaN/Inf."""


class UnsupportedModelError(QmoeError):
    """A model qmoe cannot quantize: dense, or an architecture or layout it does not know."""


class CalibrationError(QmoeError):
    """Calibration or evaluation text that is missing, empty or too short."""


class OutputError(QmoeError):
    """The destination exists, cannot be written, or has no room."""


class AuditError(QmoeError):
    """The result is not what was promised; the message lists every finding."""
