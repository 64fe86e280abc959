"""The generator as a plain causal language model: its adapter merged into the base, for servers without CLaRa.

clara export-generator CKPT OUT

What is written has the vocabulary and tokenizer of the checkpoint, so that prompts keep their ids.
"""

import argparse
import copy
import os

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from clara_hf.program import UsageError, run_program
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import GENERATOR


def merged_generator(model: CLaRaForRetrievalGeneration) -> PreTrainedModel:
    """A copy of the decoder with the generator merged into its weights, and without any adapter.

    Raises:
        ValueError: the base is quantized.
    """
    if model.quantized_by is not None:
        raise ValueError(f"the base is quantized ({model.quantized_by}): load the checkpoint in full precision.")
    decoder = copy.deepcopy(model.decoder)
    for name, layer in [(name, one) for name, one in decoder.named_modules() if isinstance(one, BaseTunerLayer)]:
        layer.merge(adapter_names=[GENERATOR])
        decoder.set_submodule(name, layer.get_base_layer())
    del decoder.peft_config
    decoder.generation_config.update(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    return decoder.requires_grad_(False)


def export_generator(checkpoint: str, out: str, **options) -> None:
    """Write the merged generator of `checkpoint` and its tokenizer to the new folder `out`.

    Args:
        options: of `from_pretrained` (`revision`, `subfolder`, `dtype`, ...).

    Raises:
        UsageError: `out` exists and holds something, or there is no checkpoint.
    """
    if os.path.isdir(out) and os.listdir(out):
        raise UsageError(f"{out} is not empty: give a new folder.")
    try:
        model = CLaRaForRetrievalGeneration.from_pretrained(checkpoint, **options)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    beside = f"{os.path.abspath(out)}.partial"
    merged_generator(model).save_pretrained(beside)
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    # Of the checkpoint's own classes, which the exported folder does not need.
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer._processor_class = None
    tokenizer.save_pretrained(beside)
    if os.path.isdir(out):
        os.rmdir(out)
    os.replace(beside, out)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="clara export-generator", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="folder or Hub id of a CLaRa checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--revision", help="branch, tag or commit of CKPT")
    parser.add_argument("--subfolder", help="folder of CKPT's repository")
    parser.add_argument("--dtype", default="auto", help="of the weights that are written; by default the checkpoint's")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    export_generator(given.pop("checkpoint"), given.pop("out"), **given)


if __name__ == "__main__":
    run_program(main)
