"""The generator as a plain causal language model: its adapter merged into the base, for servers without CLaRa.

clara export-generator CKPT OUT

What is written has the vocabulary and tokenizer of the checkpoint, so that prompts keep their ids.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from clara_hf.program import option, parse, run_program
from clara_hf.program.errors import loading
from clara_hf.program.files import new_folder
from clara_hf.program.models import DTYPES, ModelSource
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import GENERATOR
from modeling_clara.configuration_clara import give_usual_rights


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


def export_generator(model: CLaRaForRetrievalGeneration | str, out: str | os.PathLike, **options) -> None:
    """Write the merged generator of `model` and its tokenizer to the new folder `out`.

    Args:
        model: a model, or a checkpoint's folder or Hub id.
        options: of `from_pretrained` (`revision`, `subfolder`, `dtype`, ...), where it is loaded here.

    Raises:
        UsageError: `out` exists and holds something, or there is no checkpoint.
    """
    if isinstance(model, str):
        with loading("checkpoint", model):
            loaded = CLaRaForRetrievalGeneration.from_pretrained(model, **options)
    else:
        loaded = model
    with new_folder(Path(out)) as folder:
        merged_generator(loaded).save_pretrained(folder)
        tokenizer = copy.deepcopy(loaded.processor.tokenizer)
        # Of the checkpoint's own classes, which the exported folder does not need.
        tokenizer.init_kwargs.pop("auto_map", None)
        tokenizer._processor_class = None
        tokenizer.save_pretrained(folder)
        give_usual_rights(folder)


@dataclass
class ExportArguments:
    """What `clara export-generator` writes, and where."""

    checkpoint: str = option(help="Folder or Hub id of a CLaRa checkpoint.", positional=True)
    output_dir: str = option(help="Folder to write; must not exist, or be empty.", positional=True, aliases="--out")
    revision: str | None = option(None, "Branch, tag or commit of the checkpoint.")
    subfolder: str = option("", "Folder of the checkpoint's repository.")
    dtype: str = option("auto", "Dtype of the exported weights.", choices=DTYPES)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(ExportArguments, arguments, description=__doc__)
    source = ModelSource(options.checkpoint, options.revision, options.subfolder, options.dtype)
    export_generator(source.model_name_or_path, options.output_dir, **source.options)


if __name__ == "__main__":
    run_program(main)
