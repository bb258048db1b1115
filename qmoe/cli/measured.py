"""What presets and methods were measured to do, for the help. tests/cli holds the figures against
docs/quality/quality.csv, which scripts/bench_quality.py writes."""

# By name of the row in the CSV, on the Qwen3-MoE, seed 0, everything asymmetric in groups of 128.
# At 2 bits: KL to the original as a share of round-to-nearest's, calibrated on text of all domains
# and of one, and CPU seconds (of the first).
PRESETS = {"gptq": (0.23, 0.35, 23), "balanced": (0.13, 0.14, 39), "best": (0.07, 0.07, 377)}
# At 4 bits: KL in thousandths of a nat per token.
METHODS_KL = {"rtn": (2.60, 2.60), "gptq": (0.76, 1.12)}


def _preset(row: str) -> str:
    matched, mismatched, seconds = PRESETS[row]
    return f"{matched:.2f} / {mismatched:.2f}  {seconds:4d} s"


def _method(row: str) -> str:
    matched, mismatched = METHODS_KL[row]
    return f"{matched:.2f} / {mismatched:.2f}"


METHODS = f"""\
presets, with KL to the original as a share of round-to-nearest's when everything is at 2 bits, g128
asymmetric, on a 21 M parameter Qwen3-MoE (32 experts, top-4), calibrated on text of seven domains /
of one domain only, measured on test text of all seven; and CPU seconds (docs/quality has more):
  fast      {_preset("gptq")}  GPTQ on min-max grids, 128 samples of the text
  balanced  {_preset("balanced")}  grids and integers searched under the Hessian; matrices refitted
                                 to the inputs that quantized ones give; 64 samples of the text
                                 and 64 that the model writes itself
  best      {_preset("best")}  128 samples of both kinds; each layer tuned for 200 steps
methods, with KL in thousandths of a nat per token on the same model at 4 bits:
  rtn       {_method("rtn")}   round to nearest, needs no text
  awq                     channels scaled by their activations, then round to nearest
  awq-gptq                the same scales, then GPTQ; nothing is refitted
  gptq      {_method("gptq")}   the default (measured with preset fast)
rtn and awq have none of the steps that balanced and best are made of: they go with no preset, or
with fast.
"""
