"""Which files hold a checkpoint's weights. No torch: a start is refused before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path


class WeightsError(ValueError):
    """The files do not hold what the config promises."""


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint, in a fixed order: what the index names, or the single file.

    `stem`: how their names begin; transformers writes "model", diffusers "diffusion_pytorch_model".
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is no index of weights ({error!r}); download it again") from None
        for name in names:
            if Path(name).name != name:
                raise WeightsError(f"{index} names the file {name!r}; only files beside the index are read")
            if not (folder / name).is_file():
                raise WeightsError(f"{index} names {name!r}, which is not there; download the rest of the model")
        return [folder / name for name in names]
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise WeightsError(
            f"{folder} holds weights as pickle files only, which can run code when they are opened; "
            f"convert them to safetensors"
        )
    raise WeightsError(
        f"{folder} holds neither {stem}.safetensors nor {stem}.safetensors.index.json; "
        f"download the weights or use the load format 'dummy'"
    )
