"""Files that a run writes and reads back: arrays and JSON with a digest of what they hold, whole or not at all."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

from sae_utils import UserError, atomic, check_digest, digest, show_path


def sweep_temporary(folder: Path) -> None:
    """Deletes what `atomic`, an export or a removal left in `folder` where its process was killed. For whoever holds the folder's lock."""
    for file in folder.glob(".*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # asks whether there is such a process, and does nothing to it
        except ProcessLookupError:
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):  # no file of ours, or a process of somebody else
            pass


def save_arrays(path: Path, arrays: dict, compressed: bool = False) -> None:
    """Writes a .npz of arrays, with their digest."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, digest=digest(arrays), **arrays)  # first: a directory cut short loses the last


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote. UserError where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = dict(archive)
    except FileNotFoundError:
        raise UserError(f"there is no {show_path(path)}.") from None
    except Exception as error:  # the reader of zip archives raises many kinds
        raise UserError(f"{show_path(path)} is damaged ({str(error).partition(chr(10))[0][:150] or type(error).__name__}).") from None
    return check_digest(found, path)


def write_json(path: str | Path, value, sealed: bool = False) -> None:
    """Writes JSON that any parser reads: NaN and infinities become null. `sealed`: a dictionary, with its digest."""

    def plain(v):
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    value = plain(value)
    if sealed:
        value = json.loads(json.dumps(value))  # as it will be read: numpy's numbers and `Bytes` become plain ones
    with atomic(path) as temporary:
        text = json.dumps(value | {"digest": digest(value)} if sealed else value, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The dictionary that `write_json` wrote. UserError where the file is missing or damaged, or does not agree with its digest."""

    def refuse(constant):
        raise ValueError(f"{constant} is none of JSON's numbers")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise UserError(f"there is no {show_path(path)}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{show_path(path)} is cut off, or not of this project ({str(error)[:150]}).") from None
    return check_digest(found, path)
