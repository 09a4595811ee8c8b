"""An exported SAE on the Hugging Face hub, with a model card made from its run: `make publish`."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import jinja2

import experiment
import fidelity
import formats
import sae_utils
import storing
from sae_utils import UserError

# What stands in the card of the run's parameters, where it is given and had a say; the others are of the machine or are said elsewhere.
SETTINGS = """layer hook chat seq_len activation_dtype architecture k auxk_weight dead_after expansion normalize apply_b_dec_to_input l1_coeff l0_weight
    batch_size lr warmup_steps lr_min_ratio lr_decay_fraction epochs early_stop_epochs seed""".split()
COLUMNS = ["CE (nats)", "increase of CE", "KL (nats)", "top-1 changed", "FVU", "L0"]


def public_name(name: str) -> str:
    """A hub id as it is; "" for a local path, which says nothing to others."""
    try:
        return "" if Path(sae_utils.local_or_hub(name, "model")).is_absolute() else name
    except UserError:  # a path of another day
        return ""


def limits(metrics: dict, params: dict) -> list[str]:
    """What the run's own figures say against it, and what they do not tell."""
    found = metrics["latents"]
    said = [f"Every figure is of {metrics['held_out_rows']:,} held-out rows of this text, at one layer and from one seed: the run tried no other."]
    said.append(f"{len(found['dead']):,} of {metrics['d_sae']:,} latents never fired on the held-out rows; {len(found['ultra_dense']):,} fire on more than a tenth of them.")
    if "mean_post_norm" in metrics["fidelity"]:
        said.append("A norm of the model follows the hook before the output is added to the residual stream: SAEs made for that norm's output are not comparable.")
    low, high = metrics["fidelity"]["sae"]["ce_increase"][1:]
    if low <= 0:
        said.append(f"The interval of the increase of cross-entropy, {low:+.4f} to {high:+.4f} nats, holds zero: these windows do not show whether there is one.")
    said.append(f"What ablating a latent does was measured for {len(metrics['effects']):,} of {metrics['d_sae']:,}; what a latent stands for is no part of these figures.")
    return said + [text.strip() for text in (*metrics["notices"], *metrics["doctor"])]


def model_card(run: str | Path, repo: str, format: str = "saelens") -> str:
    """README.md for `repo` on the hub, made of a finished run's params.json and metrics.json alone.

    What is not a hub id (a local model or text) is called by the name of its folder or file, and neither base_model nor
    datasets is claimed for it. UserError where a figure that it is made of is lacking.
    """
    run = Path(run)
    record, metrics = (storing.read_json(run / name) for name in ("params.json", "metrics.json"))
    params = experiment.recorded_params(run / "params.json", "sae_training")
    if params["trained_sae"]:
        raise UserError(f"{sae_utils.show_path(run)} looks at an SAE that was not trained in this run: publish it from the run that did.")
    wanted = ("finding", "findings", "fidelity", "latents", "effects", "data", "held_out_rows", "notices", "doctor")
    if lacking := [name for name in wanted if name not in metrics]:
        raise UserError(f"{sae_utils.show_path(run)}/metrics.json lacks {', '.join(lacking)}: train the run again for a card.")
    idle = experiment.idle(params)
    names = {kind: params[f"{kind}_name"] for kind in ("model", "dataset")}
    base, data = (public_name(name) for name in names.values())
    data_name = data and " ".join(filter(None, [f"[{data}](https://huggingface.co/datasets/{data})", params["dataset_config"], params["dataset_split"]]))
    header = huggingface_hub.ModelCardData(
        library_name="saelens" if format == "saelens" else None, base_model=base or None, datasets=[data] if data else None,
        tags=["sparse-autoencoder", "mechanistic-interpretability", params["architecture"]],
    )  # fmt: skip
    rows = [list(row) for row in zip(*fidelity.cells(metrics["fidelity"]), strict=True)]
    chosen = [0, *(rows[0].index(name) for name in COLUMNS)]
    lines = [[re.sub(r"(?s)\n(.*)", r" (\1)", row[column]) if number and column else row[column].replace("\n", " ") for column in chosen] for number, row in enumerate(rows)]
    lines.insert(1, ["---"] * len(chosen))
    local = lambda name: f"`{Path(name).name}` (local)"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["commas"] = "{:,}".format
    return environment.get_template("model_card.md").render(
        header=header.to_yaml(), title=f"{repo.rpartition('/')[2]}: an SAE for {base or Path(names['model']).name}, layer {params['layer']}", repo=repo, format=format, m=metrics, p=params,
        hook_name=record["hook_name"], commit=record.get("model_commit"), model=f"[{base}](https://huggingface.co/{base})" if base else local(names["model"]),
        dataset=data_name or local(names["dataset"]), settings=[(name, params[name]) for name in SETTINGS if name not in idle and params[name] != ""],
        versions="Made with " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + (f"; code at commit {record['git_commit']}" if record.get("git_commit") else "") + ".",
        table="\n".join(f"| {' | '.join(line)} |" for line in lines), limits=limits(metrics, params),
    )  # fmt: skip


def without_places(value):
    """What a JSON file holds, with the last part of each absolute path in place of the path."""
    if isinstance(value, dict):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def publish(run: Path, exported: Path, repo: str, dry_run: bool = False, private: bool = True) -> Path:
    """Lays the exported files and the card into <run>/export/publish, made anew and without this machine's paths (a card that was edited there is kept), and pushes that folder to `repo`.

    `dry_run`: nothing is pushed, and no token is asked for. A repository that is not there is made, private unless told
    otherwise; one that holds anything but an SAE published like this is left alone. Returns the folder. UserError for a
    name that is none, a repository that cannot be written, or one that is somebody else's.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"REPO {repo!r} is no repository on the hub: say user/name.")
    card, folder = model_card(run, repo, exported.name), run / "export" / "publish"
    old = folder.with_name(".publish.old")  # there only while the new one takes its place, or where that was killed
    if old.exists():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)
    if exported.name == "neuronpedia":
        raise UserError(f"Neuronpedia's files hold no weights: publish with FORMAT=saelens or safetensors, and give Neuronpedia {sae_utils.show_path(exported)}.")
    readme, written = folder / "README.md", run / "export" / ".card"  # the card as it was last written there
    ours = "|".join(["README.md", *formats.EXPORTS.values()])
    if other := sorted(file.name for file in folder.glob("*") if not re.fullmatch(ours, file.name)):
        raise UserError(f"{sae_utils.show_path(folder)} holds {', '.join(other[:3])}, which this does not write: move it elsewhere.")
    if readme.exists() and written.exists() and readme.read_text(encoding="utf-8") != written.read_text(encoding="utf-8"):
        card = readme.read_text(encoding="utf-8")
        print(f"{sae_utils.show_path(readme)} is kept as you left it, whatever REPO and FORMAT it names; delete it for a new card.")
    else:
        written.write_text(card, encoding="utf-8")
    new = folder.with_name(f".publish.{os.getpid()}.tmp")
    with sae_utils.writing(folder):  # whole beside it first: the card there may be somebody's work
        shutil.copytree(exported, new)
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.rglob("*.json"):
            storing.write_json(file, without_places(json.loads(file.read_text(encoding="utf-8"))))
        folder.rename(old) if folder.exists() else None
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    print(f"{sae_utils.show_path(folder)}: {', '.join(sorted(files))}")
    if dry_run:
        return folder
    sae_utils.use_hf_token()
    hub = huggingface_hub.HfApi()
    try:
        there = set(hub.list_repo_files(repo)) - {".gitattributes"} if hub.repo_exists(repo) else set()
        if other := sorted(there - files):
            raise UserError(f"{repo} holds {', '.join(other[:3])}, which is none of this: name another repository.")
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"SAE of the run {run.name}")
    except Exception as error:
        if isinstance(error, UserError) or not sae_utils.of_loading(error):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"{repo} cannot be written on the hub ({said}): set HF_TOKEN to a token that may, or run `hf auth login`; DRY_RUN=1 needs none.") from error
    print(f"published: {done}")
    return folder
