"""The parts of a model: read from safetensors, made with random weights from a published config, or without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2TokenizerFast, T5TokenizerFast

from fastloop.config import ModelConfig
from fastloop.denoisers.files import ASSETS, config_folder, naming_key, part_source, read_part_config
from fastloop.denoisers.single_file import is_single_file, read_single_part
from fastloop.denoisers.weights import choose_files
from fastloop.errors import UserError, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QWEN_PAD = "<|endoftext|>"
QWEN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # beside random weights
T5_LENGTH = 512  # tokens that T5 was trained with; it has no positions that could run out


def part_title(name: str) -> str:
    """Return what people call a part of a pipeline: UNet, text encoder 2."""
    return name.replace("unet", "UNet").replace("_", " ")


def build_part(name: str, path: str, make: Callable[[dict], torch.nn.Module], values: dict) -> torch.nn.Module:
    """Build a part of a pipeline from its config. Raises ``UserError`` where the library cannot make it from these values."""
    try:
        return make(values)
    except Exception as error:  # diffusers and transformers raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path: cannot build the {name} of {path} from its config.json: {first}") from None


def refuse_misfits(path: str, network: str, *rows: tuple[str, int, int, str]) -> None:
    """Raise ``UserError`` where a part, the channels that it gives, those that the network takes, its key, do not fit."""
    for what, gives, takes, key in rows:
        if gives != takes:
            raise UserError(f"model.path: the {what} of {path} gives {gives} channels, its {network} takes {takes} ({key})")


def refuse_other_vae(path: str, config: ModelConfig, network: str, gives: int, takes: int, packing: int) -> None:
    """Raise ``UserError`` where a VAE's latents, packed by so many into one, have not the channels that the network takes."""
    if packing * gives != takes:
        key, where = ("model.path", path) if config.vae.path is None else ("model.vae.path", config.vae.path)
        raise UserError(
            f"{key}: the VAE{', packed,' if packing > 1 else ''} of {where} gives {packing * gives} channels, the "
            f"{part_title(network)} takes {takes} (in_channels)"
        )


def maker(kind: type):
    """Return what makes a part from the values of its config.json."""
    return kind.from_config if hasattr(kind, "from_config") else lambda values: kind(kind.config_class(**values))


def read_part(name: str, kind: type, path: str, config: ModelConfig, dtype: torch.dtype, _: torch.device) -> torch.nn.Module:
    """Load a part's weights in a dtype. Raises ``UserError`` where they are not there or not complete."""
    where, folder, own = part_source(name, path, config)
    if is_single_file(where):
        values = read_part_config(name, path, config)
        with naming_key(name, config), _refusing(name, where, config):
            return read_single_part(name, kind, where, values, config_folder(path), dtype)
    key = "torch_dtype" if hasattr(kind, "from_config") else "dtype"  # diffusers, transformers
    files = choose_files(name, path, config)
    weights = {"use_safetensors": files.safetensors, "variant": files.variant, "output_loading_info": True, key: dtype}
    with naming_key(name, config), _refusing(name, where, config):
        part, info = kind.from_pretrained(where, subfolder=folder, revision=own.revision, **weights)
        if missing := sorted(info["missing_keys"]):  # the libraries would leave these weights random or empty
            raise ValueError(f"its file lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return part


def random_part(
    name: str, kind: type, path: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """Build a part on its device from its config, with the libraries' initial weights from seed 0, as in every process."""
    values = read_part_config(name, path, config)
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            return build_part(name, path, maker(kind), values)
        finally:
            torch.set_default_dtype(before)


def read_tokenizer(encoder: str, path: str, config: ModelConfig, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a text encoder, CLIP, T5 or Qwen3.

    Beside random weights it is the bundled model's, or of its words, at the length of the real one.
    """
    kind = {"t5": T5TokenizerFast, "qwen3": Qwen2TokenizerFast}.get(text_config.model_type, CLIPTokenizer)
    name = encoder.replace("text_encoder", "tokenizer")
    if config.random_init:
        tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer")
        if kind is T5TokenizerFast:
            words = [token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")]
            vocabulary = [*(f"▁{word}" for word in sorted(words)), "▁"]
            scores = [*((token, 0.0) for token in ("<pad>", "</s>", "<unk>")), *((token, -1.0) for token in vocabulary)]
            return T5TokenizerFast(scores, extra_ids=0, model_max_length=T5_LENGTH)
        if kind is Qwen2TokenizerFast:
            words = [QWEN_PAD, *sorted(ByteLevel.alphabet())]  # every text is bytes
            return Qwen2TokenizerFast({word: i for i, word in enumerate(words)}, [], chat_template=QWEN_TEMPLATE)
        tokenizer.model_max_length = text_config.max_position_embeddings
        return tokenizer
    with _refusing(name, path, config):
        folder = str(config_folder(path)) if is_single_file(path) else path
        tokenizer = kind.from_pretrained(folder, subfolder=name, revision=config.revision)
    words = len(tokenizer) - len(set(tokenizer.all_special_ids))
    if words < 2 or len(tokenizer) > text_config.vocab_size:  # without its files transformers makes an empty one
        raise UserError(
            f"model.path: the {name} of {path} has {len(tokenizer)} words and its text encoder {text_config.vocab_size}: "
            f"are all files of the folder {name} there?"
        )
    if kind is CLIPTokenizer:
        tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


@contextmanager
def _refusing(name: str, path: str, config: ModelConfig) -> Iterator[None]:
    """Makes one line of whatever the libraries raise when they load a part."""
    try:
        yield
    except Exception as error:  # diffusers and transformers raise many kinds
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"model.path: cannot load the {name} of {path}"
            f"{'' if config.variant is None else f' (variant {config.variant})'}: {reason}"
        ) from None
