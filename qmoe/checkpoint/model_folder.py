"""A model folder as one value: where it is, and whether code in it may run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from qmoe.checkpoint.folders import HubOptions, resolve
from qmoe.checkpoint.model_config import read_config
from qmoe.checkpoint.reader import Checkpoint
from qmoe.checkpoint.tokenizer import open_tokenizer


@dataclass(frozen=True)
class ModelFolder:
    """path: of a folder that is there.
    trust_remote_code: whether code that lies beside the weights may run, where transformers has no
        class for the model (remote_code.py)."""

    path: Path
    trust_remote_code: bool = False

    @classmethod
    def find(
        cls, source: str | Path, trust_remote_code: bool = False, **hub: Unpack[HubOptions]
    ) -> "ModelFolder":
        """A local folder, or one that is downloaded from the Hub by its name; CheckpointError if
        there is none (folders.py)."""
        return cls(resolve(source, **hub), trust_remote_code)

    def checkpoint(self) -> Checkpoint:
        """The folder's weights, none of them read yet."""
        return Checkpoint(self.path)

    def config(self, checkpoint: Checkpoint | None = None) -> Any:
        """The transformers config; errors as `read_config` raises them. checkpoint: the folder's,
        if it is open already."""
        return read_config(checkpoint or self.checkpoint(), self.trust_remote_code)

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer; CheckpointError if there is none. config: the model's."""
        return open_tokenizer(self.path, config, self.trust_remote_code)
