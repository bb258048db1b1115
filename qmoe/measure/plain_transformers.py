"""transformers without qmoe beside qmoe: a tiny model of a family is quantized and loaded by both.

transformers has to run in a process that never imports qmoe. It expands the weights, so in float32
its logits are those of `qmoe.load`, where it finds the experts in the folder at all. Where it does
not, `qmoe check --engine transformers` has to say so.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qmoe.checkpoint.model_config import model_class
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.engines.check import check
from qmoe.errors import AuditError
from qmoe.measure.families import Family, save_tiny
from qmoe.measure.family_check import TOLERANCE, distance
from qmoe.model.skeleton import inputs_of
from qmoe.packed.load import load
from qmoe.pipeline.quantize import quantize

CONFIG = QuantConfig("rtn", experts=Scheme(4, 32), dense=Scheme(8, CHANNEL))
# A line read is a folder and a class; a line written is what went wrong, or nothing.
CLIENT = """
import sys, torch, transformers

def run(folder, kind):
    assert not [name for name in sys.modules if name.startswith("qmoe")]
    model, told = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "mismatched_keys"):
        assert not told[what], f"{what}: {sorted(map(str, told[what]))[0]}"
    found = [name for name in told["unexpected_keys"] if "_packed" in name]
    assert not found, f"no place for {sorted(found)[0]}"
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits, f"{folder}/logits.pt")

for line in sys.stdin:
    try:
        run(*line.split())
        print(flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".partition("\\n")[0], flush=True)
"""

EQUAL = "equal logits"
Client = Callable[[Path, str], str]


@contextmanager
def plain_client() -> Iterator[Client]:
    """`client(folder, class)` has transformers load a folder and write the logits of `inputs.pt` in
    it into `logits.pt`; it says what went wrong, or nothing. One process serves all calls, because
    its imports take longer than a tiny model."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", CLIENT]

    def ask(folder: Path, kind: str) -> str:
        print(folder, kind, file=process.stdin, flush=True)
        said = process.stdout.readline()  # type: ignore[union-attr]
        if not said:
            raise AuditError(f"{folder}: the process that loads it with transformers ended")
        return str(said.strip())

    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield ask
        process.stdin.close()  # type: ignore[union-attr]


@torch.no_grad()
def beside_plain(family: Family, folder: Path, client: Client) -> str:
    """What transformers without qmoe does with a tiny model of the family, quantized in float32 and
    to nearest in a folder: EQUAL, or which rule of `qmoe check` says that it
    cannot load it.

    Raises AuditError if logits differ, those of `from_pretrained` and of `qmoe.load` included, or
    if no rule says why the folder does not load.
    """
    source, quantized = folder / "source-32", folder / "quantized-32"
    save_tiny(family, source)
    quantize(source, quantized, CONFIG, progress=False)
    model, _ = load(quantized, torch.float32, progress=False)
    inputs = inputs_of(model, torch.arange(1, 65).view(2, 32) * 3)
    ours = model(**inputs).logits
    kind = model_class(model.config)
    theirs = kind.from_pretrained(quantized, dtype=torch.float32)(**inputs).logits
    if not (lost := distance(theirs, ours)) <= TOLERANCE:
        raise AuditError(f"{family.model_type}: from_pretrained is off by {lost:.1e} from load")
    torch.save(dict(inputs), quantized / "inputs.pt")
    wrong = client(quantized, kind.__name__)
    if not wrong:
        lost = distance(torch.load(quantized / "logits.pt"), ours)
        wrong = "" if lost <= TOLERANCE else f"logits are off by {lost:.1e}, RMS"
    broken = check(quantized, "transformers")["broken"]
    if not wrong:
        return EQUAL
    if not broken:
        raise AuditError(
            f"{family.model_type}: transformers without qmoe: {wrong}; and `qmoe check --engine "
            "transformers` finds no rule that is broken"
        )
    return f"refused by `qmoe check`: {broken[0]['about']}"
