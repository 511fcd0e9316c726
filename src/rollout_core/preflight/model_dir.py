"""The specs of a model directory without its weights: safetensors headers, else a transformers config on the meta device."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import TensorSpec, specs_of
from rollout_core.errors import RolloutCoreError, SourceError

_CONFIG: Final = "config.json"
_INDEX: Final = "model.safetensors.index.json"
#: Weights in other formats, named when they are all there is, so that nobody wonders why they were passed over.
_UNREAD: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.msgpack", "*.h5")


def specs_from_dir(path: Path) -> tuple[list[TensorSpec], str]:
    """The specs of the model in ``path`` and a few words on where they came from; reads no tensor data and writes nothing there.

    ``path`` is a directory or one safetensors file. Safetensors headers come first: they give the names and dtypes of the
    checkpoint, and tied names only if a file's metadata lists them. Without them the model is built from config.json on the
    meta device: that gives the names of the transformers module, buffers and tied weights included, in the dtype of the config,
    unquantized. The words say where the two differ.

    Raises ``SourceError`` if there is neither, or if what is there cannot be read.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist; pass the directory of a model, with safetensors files or a {_CONFIG}")
    if path.is_file() or any(path.glob("*.safetensors")):
        return _from_headers(path), "safetensors headers"
    if (path / _CONFIG).is_file():
        return _from_config(path)
    raise SourceError(
        f"{path} has no *.safetensors and no {_CONFIG}{_what_else(path)}; pass the directory that save_pretrained wrote, or put "
        f"the {_CONFIG} of the model there (no weights are needed)"
    )


def _what_else(path: Path) -> str:
    if (path / _INDEX).is_file():
        return f" ({_INDEX} is there, and none of the files that it lists)"
    unread = sorted(file.name for pattern in _UNREAD for file in path.glob(pattern))
    return f" (there is {unread[0]}, a format that is not read)" if unread else ""


def _from_headers(path: Path) -> list[TensorSpec]:
    if path.is_file() and path.suffix != ".safetensors":
        raise SourceError(f"{path} is a file that does not end in .safetensors; pass the directory of a model, or such a file")
    try:
        return specs_of(path)
    except RolloutCoreError:
        raise
    except Exception as error:  # SafetensorError has no base of its own, and a shard may be unreadable in any way
        raise SourceError(
            f"the safetensors headers of {path} cannot be read ({_gist(error)}); copy or download the file again"
        ) from error


def _from_config(path: Path) -> tuple[list[TensorSpec], str]:
    wanted = _architecture(path / _CONFIG)
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            f"{path} has no *.safetensors, and reading its {_CONFIG} takes transformers: pip install 'rollout-core[hf]'"
        ) from error
    try:
        # Code from the directory is never run, and False rather than None keeps transformers from asking at the terminal.
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and whatever a config class raises for values it does not take
        raise SourceError(
            f"transformers {transformers.__version__} cannot read {path / _CONFIG} ({_gist(error)}); a newer transformers "
            "may know the model, and safetensors files there are read without it"
        ) from error
    maker = _maker(transformers, config, wanted)
    try:
        with torch.device("meta"):
            model = maker(config)
    except Exception as error:  # the constructors of several hundred model classes
        raise SourceError(
            f"transformers {transformers.__version__} cannot build {wanted or 'a model'} from {path / _CONFIG} "
            f"({_gist(error)}); correct the config, or put the model's safetensors files there"
        ) from error
    specs = specs_of(model)
    return specs, _words(model, config, wanted, specs)


def _architecture(config: Path) -> str | None:
    """``architectures[0]`` of a config, None if it has none."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise SourceError(f"{config} is no readable JSON ({_gist(error)}); copy or download it again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{config} holds a JSON {type(content).__name__}, not an object; copy or download it again")
    names = content.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise SourceError(f"architectures in {config} is {names!r}; it is a list of class names, or absent")
    return names[0]


def _maker(transformers: Any, config: Any, wanted: str | None) -> Any:
    """What builds the model: the class that the config names, if transformers has it, else the auto class that takes the config."""
    named: Any = getattr(transformers, wanted, None) if wanted is not None else None
    if inspect.isclass(named) and issubclass(named, transformers.PreTrainedModel):
        model_class: Any = named
        return model_class._from_config
    # Image-text first: given the config of a vision-language model, the causal auto class builds its language model alone.
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText.from_config
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config
    return transformers.AutoModel.from_config


def _words(model: Any, config: Any, wanted: str | None, specs: Sequence[TensorSpec]) -> str:
    built = type(model).__name__
    words = [built if wanted in (None, built) else f"{built}, as this transformers has no {wanted}", "meta device"]
    if getattr(config, "quantization_config", None) is not None:
        words.append("unquantized: quantization_config is not applied")
    if any(len(spec.shape) == 3 and "experts" in spec.name.split(".") for spec in specs):
        words.append("module names with stacked experts: a checkpoint may name each expert")
    kept = {
        part for field in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict") for part in getattr(model, field, None) or ()
    }
    if kept and model.dtype != torch.float32:
        words.append(f"from_pretrained may keep {', '.join(sorted(kept))} in float32")
    return f"{_CONFIG} ({', '.join(words)})"


def _gist(error: BaseException) -> str:
    """The error on one line; some of transformers' say what is wrong on their second line, and some go on for pages."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else text[:237] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
