"""From text to activations: documents, windows, and the rows on disk that runs share.

    text -> documents -> windows of seq_len tokens -> forward pass as far as the hook
         -> one row for each token that is text -> runs/activations/<key>/

A store is a folder: rows.bin (N, d_in), memory-mapped; tokens.npz, which says of every row which
token of which window it is; manifest.json, which says how it came to be and holds a checksum of
every shard. `<key>.partial` is one that is not whole yet.
"""

import errno
import fnmatch
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_utils import UserError, atomic, encode_text, hub_errors, local_or_hub, pad, resolve, run_to_hooks, show_path, special_ids, use_hf_token, with_bos
from showing import Line, duration, in_bytes
from storing import write_json

STORE_VERSION = 4
SPLIT_SEED = 0  # of the choice of held-out documents: no parameter, so that runs of other seeds are judged on the same text
SPLIT = 2  # how that choice is made, as an SAE's file says it (before there was a word of it: every tenth document)

# ---------------------------------------------------------------------------------------------
# Text: documents
# ---------------------------------------------------------------------------------------------

ARTICLE = re.compile(r"^ = [^=].*[^=] = \s*$")  # WikiText's mark of a new article
STREAMED_FROM, BYTES_PER_ROW = 10**9, 100  # a hub dataset larger than both (the second for each row wanted) is not fetched whole
SHUFFLE_BUFFER = 10_000  # rows of a stream among which the next one is drawn


@dataclass
class Text:
    """Documents to iterate over, as often as need be, and a digest of what they are. A document is a string,
    or, for chats, a list of messages."""

    values: object  # () -> iterator over the column's values
    fingerprint: str
    articles: bool  # the values are WikiText's lines
    notice: str = ""  # what a reader should know

    def __iter__(self):
        values = (value for value in self.values() if value and (not isinstance(value, str) or value.strip()))
        return join_articles(values) if self.articles else values


def open_text(params: dict, streamed_from: int = STREAMED_FROM) -> Text:
    """The text that the parameters name: rows of .jsonl or .parquet files, whole .txt files, a folder
    of either, or a `datasets` id.

    WikiText's rows are lines, which are joined into articles: where the name of the dataset says wikitext and
    its first 1000 rows are single lines with headings among them, and nowhere else. `dataset_config` and
    `dataset_split` are ignored for local text. Raises UserError where there is no text, here or, naming file
    and line, while one iterates.
    """
    name, column = params["dataset_name"], params["text_column"]
    source = local_or_hub(name, "dataset")
    kinds = "text or lists of messages" if params["chat"] else "text"

    def checked(places):
        """The values of (where, value, how to leave it out), each of which has to be text."""
        with hub_errors("dataset", name):  # what is streamed may break off at any row
            for where, value, instead in places:
                if value is not None and not isinstance(value, (str, list) if params["chat"] else str):
                    raise UserError(f"{where}: column {column} does not hold {kinds}, but {str(value)[:60]!r}{instead}.")
                if not encodable(value):
                    raise UserError(f"{where}: column {column} holds half a character (a surrogate without its other half), which no tokenizer reads{instead}.")
                yield value

    with hub_errors("dataset", name):
        if Path(source).exists():
            files = local_files(Path(source), name)
            columns, identity = columns_of(files[0]), [files[0].suffix.lower(), digest_of_files(files)]
            places = partial(values_of_files, files, column)
        else:
            columns, identity, places = hub_text(source, params, streamed_from)
        if columns and column not in columns:
            raise UserError(f"dataset {name} has no column {column}; it has: {', '.join(columns)}.")
        values = lambda: checked(places())
        lines, headings = True, False
        for value in itertools.islice(values(), 1000):
            if isinstance(value, str):
                lines, headings = lines and "\n" not in value.rstrip("\n"), headings or bool(ARTICLE.match(value))
    articles = lines and headings and "wikitext" in (Path(source).name if Path(source).exists() else source).lower()
    notice = f"dataset {name}: WikiText's lines are joined into articles" if articles else ""
    text = Text(values, digest_of([*identity, articles]), articles, notice)
    if next(iter(text), None) is None:
        raise UserError(f"dataset {name} is empty: column {column} holds no text.")
    return text


def encodable(value) -> bool:
    """Whether a string, or what a list of messages holds, is text that UTF-8 can write."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def hub_text(source: str, params: dict, streamed_from: int = STREAMED_FROM) -> tuple[list[str], list, object]:
    """(columns, identity, () -> iterator over (where, value, "")) of a text on the Hugging Face hub.

    It is streamed where it is not on this disk and where the hub says that it is larger than `streamed_from` and
    than BYTES_PER_ROW for each row wanted, or does not say; else it is fetched whole, in its own order, and
    needs no network the next time. Neighbours in a terabyte are often alike, so a stream's rows pass
    through a buffer that shuffles them, the same way each time; but for WikiText, whose rows belong together. `identity`, of the commit, says so, as the rows are then others.
    """
    import datasets

    use_hf_token()
    datasets.disable_progress_bars()
    column, split = params["text_column"], params["dataset_split"]
    which = {"name": params["dataset_config"] or None, "revision": params["dataset_revision"] or None}
    builder = datasets.load_dataset_builder(source, **which)
    if not builder.hash:
        raise UserError(f"the commit of dataset {source} cannot be told (datasets {datasets.__version__}): load it once, save it as a .jsonl file and name that.")
    size = (getattr((builder.info.splits or {}).get(split), "num_bytes", 0) or math.inf) if re.fullmatch(r"[\w.-]+", split) else 0  # a slice is not streamed
    streaming = not Path(builder.cache_dir).exists() and size > max(streamed_from, BYTES_PER_ROW * params["n_activations"])
    rows = datasets.load_dataset(source, split=split, streaming=streaming, **which)
    columns = rows.column_names or list(next(iter(rows), {}))
    mixed = streaming and "wikitext" not in source.lower()

    def places():
        found = ((f"dataset {source}, row {number}", row[column], "") for number, row in enumerate(rows.select_columns([column])))
        return shuffled(found, SHUFFLE_BUFFER) if mixed else found

    return columns, [source, builder.config_id, builder.hash, split, *(["shuffled", SHUFFLE_BUFFER] if mixed else [])], places


def shuffled(values, size: int, seed: int = 0):
    """The values, each drawn at random from the `size` that are at hand; the same way whatever version `datasets` has,
    since the rows' key depends on it."""
    draw, held = random.Random(seed), []
    for value in values:
        if len(held) < size:
            held.append(value)
        else:
            place = draw.randrange(size)
            yield held[place]
            held[place] = value
    draw.shuffle(held)
    yield from held


# ---------------------------------------------------------------------------------------------
# Text: local files
# ---------------------------------------------------------------------------------------------


def read_jsonl(file: Path, column: str = ""):
    """Yields (where, row, how to go on without it) of each line that is not blank, as `open_text` wants them."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where, instead = f"{show_path(file)}, line {number}", f"; mend that line, or leave it out: sed {number}d {shlex.quote(show_path(file))} > mended.jsonl"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                what = f"{error.msg}, character {error.pos}" if isinstance(error, json.JSONDecodeError) else "not even UTF-8"
                raise UserError(f"{where} is not JSON ({what}){instead}.") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object with columns by name{instead}.")
            yield where, row, instead


def read_txt(file: Path, column: str = ""):
    """A whole file is one row."""
    try:
        yield show_path(file), {"text": file.read_text(encoding="utf-8-sig")}, ""
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(file)} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def read_parquet(file: Path, column: str):
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024, columns=[column]):
        for row in batch.to_pylist():
            yield f"{show_path(file)}, row {number}", row, ""
            number += 1


READERS = {".jsonl": read_jsonl, ".txt": read_txt, ".parquet": read_parquet}


def values_of_files(files: list[Path], column: str):
    """Yields (where, value of the column, how to go on without it) of every row; no other column is looked at."""
    for file in files:
        for where, row, instead in READERS[file.suffix.lower()](file, column):
            yield where, row.get(column), instead


def columns_of(file: Path) -> list[str]:
    """The columns of a file; of .jsonl those of its first 1000 rows."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(file).names
    rows = itertools.islice(READERS[file.suffix.lower()](file), 1000)
    return list(dict.fromkeys(name for _, row, _ in rows for name in row))


def local_files(path: Path, name: str) -> list[Path]:
    """The files of local text, in order. UserError unless they are of one kind and hold something."""
    files = text_files(path)
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= set(READERS):
        found = ", ".join(sorted(kinds)) or "nothing"
        raise UserError(f"dataset {name} must be {', '.join(READERS)} files, all of one kind; it holds {found}.")
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"dataset {name} is empty: it holds no text.")
    return files


def text_files(path: Path) -> list[Path]:
    """The files of local text: `path` itself, or all in that folder, but for hidden ones and notes (.md)."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.suffix.lower() != ".md"]


def join_articles(lines):
    """WikiText's lines as whole articles."""
    article: list[str] = []
    for line in lines:
        if article and ARTICLE.match(line):
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


# ---------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------


@dataclass
class Windows:
    """Token ids of many windows, laid end to end: `windows[i]` is a list of ids, BOS included."""

    flat: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (windows + 1,) int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i) -> list[int]:
        i = range(len(self))[int(i)]  # IndexError past the end, so that iteration stops
        return self.flat[self.starts[i] : self.starts[i + 1]].tolist()


def as_messages(document) -> list[dict]:
    """A document as a conversation: a list of messages as it is; of plain text the first line that is
    not blank is the user's, the rest the assistant's."""
    if not isinstance(document, str):
        return document
    first, _, rest = document.strip().partition("\n")
    turns = [{"role": "user", "content": first.strip()}, {"role": "assistant", "content": rest.strip()}]
    return [turn for turn in turns if turn["content"]]


def encode_documents(tokenizer, documents: list, chat: bool) -> list[list[int]]:
    """Token ids of each document without BOS in front; `chat`: through the tokenizer's chat template."""
    if not chat:
        return encode_text(tokenizer, documents)
    encoded = []
    for document in documents:
        try:
            ids = tokenizer.apply_chat_template(as_messages(document), tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:  # whatever the template raises: it is the model's own program
            raise UserError(f"a conversation does not fit the model's chat template ({error}): it begins {str(document)[:80]!r}.") from None
        encoded.append(ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids)
    return encoded


def text_digest(document) -> int:
    """64 bits that two documents share where they are equal but for white space at their ends."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def encode_beginnings(tokenizer, documents: list, chat: bool, n_rows: int):
    """Yields (document, ids) as `encode_documents` does, but of a document far longer than `n_rows` rows only a beginning that
    certainly gives as many: with 2,000 rows wanted, 10 MB are not read to their end."""
    most, special = 32 * n_rows + 4096, special_ids(tokenizer)  # characters; a token has 2 to 6 of them, as a rule
    short = [document[:most] if not chat and len(document) > most else document for document in documents]
    for document, beginning, ids in zip(documents, short, encode_documents(tokenizer, short, chat), strict=True):
        if len(beginning) < len(document):  # no row: special tokens, the first of each window without BOS, those near the cut, which may be others in the whole
            certain = int((~np.isin(ids, special)).sum()) - len(ids) // 4 - 64
            ids = ids if certain > n_rows else encode_documents(tokenizer, [document], chat)[0]
        yield document, ids


def cut_windows(tokenizer, documents, seq_len: int, n_rows: int, chat: bool = False) -> tuple[dict, dict]:
    """Cuts whole documents into windows of `seq_len` tokens, BOS in front of each, until `n_rows` rows.

    A row is a token that is no special one; without BOS the first token of a window is none either,
    since it takes BOS's part as the attention sink. The last window of a document is as short as
    what is left, and the shortest one kept holds one row.

    Returns (tokens, counts). tokens: flat (tokens,) and starts (windows + 1,) as in `Windows`,
    window_document (windows,), first_equal (documents,), the number of the first document with the same text (but for
    white space at its ends), and for each row token_ids, window, position (N,). counts: what was
    used and what was left out, by reason. UserError where there is no row.
    """
    bos = tokenizer.bos_token_id
    step = seq_len - (bos is not None)
    special = np.asarray(special_ids(tokenizer))
    windows, owners, digests, rows, skipped, short = [], [], [], 0, 0, 0
    documents = iter(documents)
    while rows < n_rows and (batch := list(itertools.islice(documents, 256))):
        for document, ids in encode_beginnings(tokenizer, batch, chat, n_rows - rows):
            is_text = ~np.isin(ids, special)
            if not is_text.any():
                skipped += 1
                continue
            before = len(windows)
            for start in range(0, len(ids), step):
                if rows >= n_rows:
                    break
                n = int(is_text[start + (bos is None) : start + step].sum())
                if n == 0:
                    short += 1
                    continue
                windows.append(np.asarray(with_bos(tokenizer, ids[start : start + step]), np.int32))
                owners.append(len(digests))
                rows += n
            if len(windows) > before:
                digests.append(text_digest(document))
            if rows >= n_rows:
                break
    if rows == 0 and short:
        raise UserError("no document has text after its first token, which gives no row where the tokenizer has no BOS: join the documents into longer ones.")
    if rows == 0:
        raise UserError("the text holds no token that is not a special one: there is nothing to train on.")
    _, first, inverse = np.unique(np.asarray(digests, np.uint64), return_index=True, return_inverse=True)
    flat, lengths = np.concatenate(windows), np.asarray([len(window) for window in windows])
    starts = np.concatenate([[0], lengths.cumsum()])
    window = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(flat)) - starts[window]
    text = ~np.isin(flat, special)
    kept = (text & ((position > 0) | (bos is not None))).nonzero()[0][:n_rows]
    tokens = {"flat": flat, "starts": starts, "window_document": np.asarray(owners, np.int32), "first_equal": first[inverse].astype(np.int32)}
    tokens |= {"token_ids": flat[kept], "window": window[kept].astype(np.int32), "position": position[kept].astype(np.int32)}
    seen = slice(0, kept[-1] + 1)
    counts = {
        "rows": len(kept), "windows": len(lengths), "documents": len(digests), "different_documents": len(first), "tokens": len(flat),
        "bos_tokens": len(lengths) if bos is not None else 0,
        "special_tokens": int((~text[seen]).sum()) - (len(lengths) if bos is not None else 0),
        "first_tokens": int((text[seen] & (position[seen] == 0)).sum()) if bos is None else 0,
        "documents_without_text": skipped, "windows_without_text": short,
    }  # fmt: skip
    return tokens, counts


def held_out_documents(n_documents: int, fraction: float, seed: int = SPLIT_SEED) -> list[bool]:
    """Which documents are held out: one of each 1 / `fraction` that follow one another, drawn at random; of the first ones it is
    one of the first two, so that of two documents and more there is always one on either side.

    What is drawn for a document hangs on its number and the seed alone, so documents that are added at the end move none across.
    """
    chosen, draw, first = set(), random.Random(seed), 0
    for block in itertools.count(1):
        last = round(block / fraction)
        chosen.add(first + int(draw.random() * (last - first if first else 2)))  # random() is the same in every version of Python
        if last >= n_documents:
            return [number in chosen and n_documents > 1 for number in range(n_documents)]
        first = last


def split_windows(window_document, fraction: float, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """(train, held_out), boolean masks over windows; a document's windows are all in one of them, and those of documents that
    are equal too, where they have one number (`Rows.window_document`).

    The documents are a random choice (`held_out_documents`), since every tenth may be from one source alone. Its seed is
    not that of the run: runs of several seeds are compared on the same text. A single document is split in two
    contiguous blocks with a window between them in neither. UserError where it is too short for that.
    """
    documents, number = torch.as_tensor(window_document).unique(return_inverse=True)
    if len(documents) > 1:
        held_out = torch.tensor(held_out_documents(len(documents), fraction, seed))[number]
        return ~held_out, held_out
    first = len(number) - max(1, round(len(number) * fraction))
    index = torch.arange(len(number))
    if first < 2:
        raise UserError(f"the text fills only {len(number)} windows: too few to train on some and hold others out.")
    return index < first - 1, index >= first


# ---------------------------------------------------------------------------------------------
# Keys: what the rows depend on
# ---------------------------------------------------------------------------------------------


def digest_of_files(files: list[Path]) -> str:
    """A digest of the files' bytes, in order; their names do not count."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:24]


def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


# The files of a model's folder that say what it computes; a README, a log or sampling settings do not.
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "adapter_*", "config.json"]
MODEL_FILES += ["tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.tiktoken"]


def model_fingerprint(model_name: str, commit: str) -> str:
    """A digest of a local model's weights, config and tokenizer, or of a hub model's id and commit."""
    folder = resolve(model_name)
    if not folder.is_dir():
        return digest_of([model_name, commit])
    files = sorted(f for f in folder.iterdir() if f.is_file() and any(fnmatch.fnmatchcase(f.name, pattern) for pattern in MODEL_FILES))
    return digest_of([[file.name, digest_of_files([file])] for file in files])


def model_commit(model_name: str, revision: str) -> str:
    """The commit of a hub model that was loaded: the folder of the hub's cache in which its config lies. UserError where it cannot be told: rows of two commits would pass for each other."""
    if resolve(model_name).is_dir() or re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(model_name, "config.json", revision=revision or None)
    commit = Path(config).parent.name if isinstance(config, str) else ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        version = huggingface_hub.__version__
        raise UserError(f"the commit of {model_name} cannot be told from the cache (huggingface_hub {version}): give its 40 digits as model_revision, or name a local folder.")
    return commit


def tokenizer_digest(tokenizer, chat: bool) -> str:
    """A digest of the vocabulary and rules, and of the chat template where it is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else sorted(tokenizer.get_vocab().items())
    if backend:  # these two change with every call
        state |= {"padding": None, "truncation": None}
    return digest_of([state, special_ids(tokenizer), tokenizer.bos_token_id, tokenizer.chat_template if chat else ""])


def as_loaded(params: dict, model, tokenizer, text: Text) -> dict:
    """The parameters with what they came to: the model's commit and precision, digests of the
    model, the tokenizer and the text, and how the text is split."""
    commit = model_commit(params["model_name"], params["model_revision"])
    if params["chat"] and not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {params['model_name']} has no chat template: use an instruct model, or chat false.")
    return params | {
        "model_revision": commit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_fingerprint": model_fingerprint(params["model_name"], commit),
        "tokenizer_fingerprint": tokenizer_digest(tokenizer, params["chat"]),
        "dataset_fingerprint": text.fingerprint,
        "split": SPLIT,
    }


def activation_key(loaded: dict, hook_name: str) -> dict:
    """Everything that changes the rows; its digest names their folder."""
    names = ("model_fingerprint", "tokenizer_fingerprint", "dataset_fingerprint", "text_column", "chat", "dtype", "seq_len")
    names += ("n_activations", "activation_dtype")
    return {"hook": hook_name, "format": STORE_VERSION, **{name: loaded[name] for name in names}}


# ---------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Activations and, aligned with them, where each row comes from."""

    activations: Tensor  # (N, d_in), memory-mapped, in the storage dtype
    token_ids: Tensor  # (N,) the token at which the row was computed
    window: Tensor  # (N,) index into `windows`
    position: Tensor  # (N,) position in the window, BOS being 0
    windows: Windows  # token ids of each window, BOS included
    window_document: Tensor  # (windows,) document number; documents that are equal have one, the first's, and count as one
    window_place: Tensor  # (windows,) the same with a number for each document, in the order of the text
    finite: Tensor  # (N,) boolean: rows with inf or NaN are False
    manifest: dict
    folder: Path

    def __len__(self) -> int:
        return len(self.token_ids)


def digest_of_span(file: Path, start: int, end: int) -> str:
    """sha256 of the bytes from `start` to `end` of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end and (block := stream.read(min(1 << 22, end - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()


def shard_spans(manifest: dict) -> list[tuple[int, int]]:
    """First and last byte of each shard that the manifest lists."""
    width = manifest["d_in"] * getattr(torch, manifest["key"]["activation_dtype"]).itemsize
    ends = list(itertools.accumulate(shard["rows"] * width for shard in manifest["shards"]))
    return list(zip([0, *ends], ends, strict=False))


def whole_shards(folder: Path, manifest: dict) -> int:
    """How many of the shards that the manifest lists are on disk as they were written, from the first on."""
    spans = shard_spans(manifest)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda span: digest_of_span(folder / "rows.bin", *span), spans))
    right = [digest == shard["sha256"] for digest, shard in zip(found, manifest["shards"], strict=True)]
    return [*right, False].index(False)


def open_rows(folder: Path, non_finite: str = "refuse") -> Rows:
    """The rows of a store. Raises UserError where it is damaged, or where it holds rows with inf or
    NaN, unless `non_finite` is "drop": then `Rows.finite` tells which."""

    def refuse(what: str):
        raise UserError(f"{show_path(folder)} is damaged ({what}): delete that folder to harvest again.")

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        n, d_in, key, shards = (manifest[name] for name in ("rows", "d_in", "key", "shards"))
        dtype = getattr(torch, key["activation_dtype"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        refuse("manifest.json is missing or cannot be read")
    if digest_of(key)[:16] != folder.name or sum(shard["rows"] for shard in shards) != n:
        refuse("manifest.json does not belong to it")
    for name in ("rows.bin", "tokens.npz"):
        if not (folder / name).exists():
            refuse(f"{name} is missing")
    if (folder / "rows.bin").stat().st_size != n * d_in * dtype.itemsize:
        refuse("rows.bin has the wrong length")
    if digest_of_files([folder / "tokens.npz"]) != manifest["tokens"]:
        refuse("tokens.npz is not what was written")
    if (whole := whole_shards(folder, manifest)) < len(shards):
        refuse(f"shard {whole} of rows.bin is not what was written")
    arrays = np.load(folder / "tokens.npz")
    windows = Windows(arrays["flat"], arrays["starts"])
    rows = torch.from_file(str(folder / "rows.bin"), shared=False, size=n * d_in, dtype=dtype).view(n, d_in)
    columns = [torch.from_numpy(arrays[name]).long() for name in ("token_ids", "window", "position")]
    finite = torch.ones(n, dtype=torch.bool)
    bad = [row for shard in shards for row in shard["non_finite"]]
    finite[bad] = False
    if bad and non_finite != "drop":
        where = f"row {bad[0]}, token {columns[0][bad[0]]} at position {columns[2][bad[0]]} of window {columns[1][bad[0]]}"
        raise UserError(f"{show_path(folder)} holds {len(bad)} rows with inf or NaN (the first: {where}); non_finite drop goes on without them.")
    place = torch.from_numpy(arrays["window_document"]).long()
    return Rows(rows, *columns, windows, torch.from_numpy(arrays["first_equal"]).long()[place], place, finite, manifest, folder)


def is_stored(loaded: dict, hook_name: str, cache: Path) -> bool:
    """Whether a whole harvest of these rows is in `cache`."""
    return (cache / digest_of(activation_key(loaded, hook_name))[:16]).exists()


def get_rows(model, tokenizer, hook_name: str, loaded: dict, cache: Path, announce=None) -> Rows:
    """Rows from the folder `cache` that runs share, harvested first where they are not there yet.

    `loaded`: the parameters as `as_loaded` returns them; `announce`: see `fill`.
    """
    folder = fill(model, tokenizer, [hook_name], loaded, cache, announce)[hook_name]
    return open_rows(folder, loaded["non_finite"])


@contextmanager
def disk_errors(cache: Path):
    """Says in one sentence what to do where the disk is full or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {show_path(cache)} is full: free some space and repeat; the whole shards written so far are kept.") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{show_path(cache)} cannot be written ({error.strerror}): mend its permissions, or choose a run_dir elsewhere.") from None
        raise


def fill(model, tokenizer, hook_names: list[str], loaded: dict, cache: Path, announce=None, **sizes) -> dict[str, Path]:
    """Harvests into `cache`, in one pass over the text, those of the hooks that are not there yet;
    returns each hook's folder.

    Two runs that want the same rows at once: one harvests, the other waits and says so. `announce`
    is called with what is to come, before anything slow: see `harvest`.
    """
    import filelock

    keys = {hook: activation_key(loaded, hook) for hook in hook_names}
    folders = {hook: cache / digest_of(key)[:16] for hook, key in keys.items()}
    if all(folder.exists() for folder in folders.values()):
        return folders
    text = open_text(loaded)
    if text.fingerprint != loaded["dataset_fingerprint"]:
        raise UserError(f"dataset {loaded['dataset_name']} is no longer the text this SAE was trained on: train it again.")
    if text.notice:
        print(text.notice, flush=True)
    with ExitStack() as stack, disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for folder in sorted(folders.values()):  # in one order, so that two runs never wait for each other
            lock = filelock.FileLock(str(folder) + ".lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print(f"another run is harvesting {show_path(folder)}: waiting for it", flush=True)
                lock.acquire()
            stack.callback(lock.release)
        lacking = {hook: folder for hook, folder in folders.items() if not folder.exists()}
        if lacking:
            stores = [Partial(hook, folder, keys[hook], model.device.type) for hook, folder in lacking.items()]
            begun = [(tokens, store.manifest["counts"]) for store in stores if (tokens := store.left_over())]
            cut = begun[0] if begun else cut_windows(tokenizer, text, loaded["seq_len"], loaded["n_activations"], loaded["chat"])
            if cut[1]["documents"] > 1 == cut[1]["different_documents"]:
                raise UserError(f"the text is one document, {cut[1]['documents']:,} times: no part of it could be held out; give other text, or that document once.")
            harvest(model, tokenizer, stores, *cut, loaded, announce, **sizes)
    return folders


class Partial:
    """A store that is being filled: `<key>.partial/`, renamed when whole.

    manifest.json lists the shards that are on disk, so a harvest that was killed goes on after them.
    """

    def __init__(self, hook: str, folder: Path, key: dict, device: str):
        self.hook, self.folder, self.path = hook, folder, folder.with_name(folder.name + ".partial")
        packages = ("torch", "transformers", "tokenizers", "datasets", "numpy")
        self.manifest = {"key": key, "device": device, "versions": {name: importlib.metadata.version(name) for name in packages}}
        self.storage, self.error, self.bad, self.file = getattr(torch, key["activation_dtype"]), 0.0, [], None

    def left_over(self) -> dict | None:
        """tokens.npz of a harvest that was killed, where it can be gone on with."""
        try:
            found = json.loads((self.path / "manifest.json").read_text())
            if any(found[name] != self.manifest[name] for name in ("key", "device", "versions")):
                print(f"{show_path(self.path)} was begun on another device or with other package versions: it is begun anew", flush=True)
                return None
            if digest_of_files([self.path / "tokens.npz"]) != found["tokens"]:
                return None
            found["shards"] = found["shards"][: whole_shards(self.path, found)]
        except (OSError, ValueError, KeyError):
            return None
        self.manifest = found
        return dict(np.load(self.path / "tokens.npz"))

    def begin(self, tokens: dict, counts: dict, about: dict, d_in: int) -> None:
        if "shards" not in self.manifest:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            with atomic(self.path / "tokens.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, **tokens)
            self.manifest |= {"d_in": d_in, **about, "tokens": digest_of_files([self.path / "tokens.npz"]), "counts": counts, "shards": []}
            (self.path / "rows.bin").touch()
            write_json(self.path / "manifest.json", self.manifest)
        self.file = (self.path / "rows.bin").open("r+b")

    @property
    def row_bytes(self) -> int:
        return self.manifest["d_in"] * self.storage.itemsize

    def write(self, x: Tensor, spans: list[tuple[int, int]], locate, non_finite: str) -> None:
        """Rows x (n, d_in) into the spans of row numbers that they fill."""
        stored = x.to(self.storage)
        bad = (~stored.isfinite().all(dim=1)).cpu()
        if self.storage != x.dtype:  # what rounding costs
            lost = (x.float() - stored.float()).square().sum(dim=1).cpu()
            self.error += lost[~bad].double().sum().item()
        if bad.any():
            rows = [row for first, last in spans for row in range(first, last)]
            found = [row for row, wrong in zip(rows, bad.tolist(), strict=True) if wrong]
            if non_finite != "drop" and x[bad.to(x.device)].isfinite().all():
                raise UserError(f"{locate(found[0])}: the activation is too large for {self.manifest['key']['activation_dtype']}; set activation_dtype to bfloat16 or float32.")
            if non_finite != "drop":
                raise UserError(f"{locate(found[0])}: the activation is inf or NaN; non_finite drop goes on without such rows, another dtype may have none.")
            self.bad += found
        data = memoryview(stored.cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        at = 0
        for first, last in spans:
            self.file.seek(first * self.row_bytes)
            self.file.write(data[at : at + (last - first) * self.row_bytes])
            at += (last - first) * self.row_bytes

    def end_shard(self, first: int, last: int) -> None:
        self.file.flush()
        shard = {"rows": last - first, "sha256": digest_of_span(self.path / "rows.bin", first * self.row_bytes, last * self.row_bytes)}
        self.manifest["shards"].append(shard | {"rounding": self.error, "non_finite": sorted(self.bad)})
        write_json(self.path / "manifest.json", self.manifest)
        self.error, self.bad = 0.0, []

    def finish(self) -> None:
        self.file.truncate(self.manifest["counts"]["rows"] * self.row_bytes)
        self.close()
        self.manifest["rows"] = self.manifest["counts"]["rows"]
        write_json(self.path / "manifest.json", self.manifest)
        self.path.rename(self.folder)

    def close(self) -> None:
        if self.file:
            self.file.close()


def batches_by_length(lengths, first: int, last: int, batch_tokens: int) -> list[list[int]]:
    """The windows `first` to `last` in batches of similar length, at most `batch_tokens` with padding."""
    batches: list[list[int]] = []
    for window in sorted(range(first, last), key=lambda w: lengths[w]):
        if not batches or (len(batches[-1]) + 1) * lengths[window] > batch_tokens:
            batches.append([])
        batches[-1].append(window)
    return batches


def harvest(
    model, tokenizer, stores: list[Partial], tokens: dict, counts: dict, loaded: dict, announce=None, shard_windows: int = 1024, batch_tokens: int = 0
) -> None:
    """Fills the stores, one for each hook, with the rows that `cut_windows` found in the text.

    Batches are made within a shard of windows and do not depend on which hooks are asked for. They
    hold at most `batch_tokens` tokens; 0: 2,048 on a CPU, whose caches that suits, else 16,384.
    `announce` is called before the harvest with a dictionary: the counts of `cut_windows`, hooks,
    done_rows, tokens_per_second and seconds (from a probe of one batch), bytes and free_bytes.
    Prints a line now and then. Raises UserError where the disk has no room.
    """
    windows, lengths = Windows(tokens["flat"], tokens["starts"]), np.diff(tokens["starts"]).tolist()
    row_of = np.searchsorted(tokens["window"], np.arange(len(windows) + 1)).tolist()  # first row of each window
    shards = [(first, min(first + shard_windows, len(windows))) for first in range(0, len(windows), shard_windows)]

    batch_tokens = batch_tokens or (2048 if model.device.type == "cpu" else 16384)

    def forward(batch: list[int], hooks: list[str]) -> list[Tensor]:
        """The hooks' outputs at the batch's rows, each (n, d_in)."""
        spans = [(row_of[w], row_of[w + 1]) for w in batch]
        which = torch.from_numpy(np.repeat(np.arange(len(batch)), [last - first for first, last in spans]))
        where = torch.from_numpy(np.concatenate([tokens["position"][first:last] for first, last in spans]))
        ids, mask = pad([windows[w] for w in batch], device=model.device)
        out = run_to_hooks(model, hooks, ids, mask if min(lengths[w] for w in batch) < ids.shape[1] else None)
        which, where = which.to(model.device), where.to(model.device).long()
        return [x[which, where] for x in out]

    def locate(row: int) -> str:
        token = tokens["token_ids"][row]
        return f"window {tokens['window'][row]}, token {tokenizer.decode([token])!r} at position {tokens['position'][row]}"

    hooks = [store.hook for store in stores]
    batches = batches_by_length(lengths, *shards[0], batch_tokens)
    probe = batches[len(batches) // 2]
    widths = [x.shape[1] for x in forward(probe[:1], hooks)]  # the first pass of a process is slow
    done = [sum(shard["rows"] for shard in store.manifest.get("shards", [])) for store in stores]
    size = sum((counts["rows"] - n) * width * store.storage.itemsize for n, width, store in zip(done, widths, stores, strict=True))
    free = shutil.disk_usage(stores[0].folder.parent).free
    share = 1 - min(done) / counts["rows"]
    if announce:
        begin = time.perf_counter()
        forward(probe, hooks)
        rate = sum(lengths[w] for w in probe) / (time.perf_counter() - begin)
        plan = {"hooks": hooks, "done_rows": min(done), "tokens_per_second": rate, "seconds": share * counts["tokens"] / rate}
        announce(counts | plan | {"bytes": size, "free_bytes": free})
    if size > free:
        raise UserError(f"the activations need {in_bytes(size)} in {show_path(stores[0].folder.parent)}, where {in_bytes(free)} are free: lower n_activations, or make room.")

    filters = {"left_out": special_ids(tokenizer) if tokenizer else [], "first_token": not counts.get("bos_tokens", 1)}
    about = {"filters": filters} | {name: loaded[name] for name in ("model_name", "model_revision", "dataset_name", "dataset_revision", "dataset_config", "dataset_split")}
    line, begin, fresh = Line(), time.monotonic(), 0
    try:
        for store, width in zip(stores, widths, strict=True):
            store.begin(tokens, counts, about, width)
        for number, (first, last) in enumerate(shards):
            todo = [store for store in stores if len(store.manifest["shards"]) == number]
            if not todo:
                continue
            for batch in batches_by_length(lengths, first, last, batch_tokens):
                spans = [(row_of[w], row_of[w + 1]) for w in batch]
                for store, x in zip(todo, forward(batch, [store.hook for store in todo]), strict=True):
                    store.write(x, spans, locate, loaded["non_finite"])
                fresh += sum(b - a for a, b in spans)
                if line.due():
                    rate = fresh / (time.monotonic() - begin)
                    left = (counts["rows"] - min(done) - fresh) / rate / 60
                    line.say(f"harvest: {min(done) + fresh:,} of {counts['rows']:,} rows, {rate:,.0f} rows/s, {left:.1f} min left")
            for store in todo:
                store.end_shard(row_of[first], row_of[last])
        for store in stores:
            store.finish()
    finally:
        for store in stores:
            store.close()


def card(plan: dict) -> str:
    """What a harvest is about to do, in a few lines."""
    different = f", {plan['different_documents']:,} of them different" if plan["different_documents"] < plan["documents"] else ""
    left_out = {name: plan[name] for name in ("special_tokens", "first_tokens", "documents_without_text", "windows_without_text")}
    lines = [
        f"{plan['rows']:,} rows from {plan['windows']:,} windows ({plan['tokens']:,} tokens) of {plan['documents']:,} documents{different}, at {', '.join(plan['hooks'])}",
        "left out: " + ", ".join([f"BOS of each of {plan['bos_tokens']:,} windows"] * (plan["bos_tokens"] > 0) + [f"{n:,} {name.replace('_', ' ')}" for name, n in left_out.items() if n]),
        f"{plan['tokens_per_second']:,.0f} tokens/s in a short probe: about {duration(plan['seconds'])}",
        f"{in_bytes(plan['bytes'])} to write, {in_bytes(plan['free_bytes'])} free",
    ]
    if plan["done_rows"]:
        lines.append(f"going on after {plan['done_rows']:,} rows that an earlier harvest left")
    if not plan["bos_tokens"]:
        lines.append("the tokenizer has no BOS: the first token of each window is left out in its place")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# What the rows are like
# ---------------------------------------------------------------------------------------------


def activation_stats(activations: Tensor, index: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """(mean (d_in), norm (N,)): the mean over the rows `index`, in float64 inside; ‖x - mean‖ of every row."""
    total = torch.zeros(activations.shape[1], dtype=torch.float64)
    for part in index.split(chunk):
        total += activations[part].double().sum(0)
    mean, norm = (total / len(index)).float(), torch.empty(len(activations))
    for own, part in zip(norm.split(chunk), activations.split(chunk), strict=True):  # not kept piece by piece: the memory between small pieces is not given back
        torch.linalg.vector_norm(part.float() - mean, dim=1, out=own)
    return mean, norm


def spectrum(activations: Tensor, index: Tensor, most: int = 65536) -> tuple[Tensor, float, Tensor]:
    """(variances (d_in), largest first; effective rank; principal components (d_in, d_in), one a row, the
    largest first) of the rows `index`, at most `most` of them, evenly spread, in float64 inside.

    Effective rank: exp of the entropy of the covariance's eigenvalues, taken as shares of their sum
    (Roy and Vetterli 2007). From 1 (one direction) to d_in (all alike).
    """
    chosen = index[:: -(-len(index) // most)]
    x = torch.cat([activations[part].double() for part in chosen.split(8192)])
    covariance = torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    share = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum()
    components = eigenvectors.flip(1).T.float()
    return covariance.diagonal().sort(descending=True).values, torch.special.entr(share).sum().exp().item(), components
