"""A part of `make test-browser`: Run All of both notebooks in JupyterLab, in a real browser without a window.

A copy of the project in a scratch folder gets parameters for a small run of the tiny model, as somebody would type them
into the parameters cell; then each notebook is opened, run and saved there. What must be right: no cell fails, the run's
folder is finished, the panel and the stepping cell stand there and answer. [SHOTS=folder: pictures of what was seen]
"""

import ast
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket  # jupyter_server's own
from browser import browser

ROOT = Path(__file__).resolve().parent.parent
TRAIN = {"model_name": "runs/tiny-model", "dataset_name": "runs/tiny-world/corpus.jsonl", "layer": 1, "n_activations": 60_000, "activation_dtype": "float32", "architecture": "batchtopk", "k": 7, "epochs": 3, "run_dir": "runs/lab", "eval_windows": 16}
PATCH = {"run_dir": "runs/lab", "n_prompts": 4, "n_controls": 4, "name": "lab"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fetch(url: str):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def until(what, seconds: float, every: float = 0.5):
    """What `what()` returns once that is true; a failure to connect is not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(every)
    raise SystemExit(f"Error: not within {seconds:g} s")


class Page:
    """A tab of a headless browser, spoken to by its debugging protocol."""

    def __init__(self, url: str, profile: str):
        port = free_port()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run", "--remote-allow-origins=*"]
        flags += [f"--remote-debugging-port={port}", f"--user-data-dir={profile}", "--window-size=1500,1100"]
        self.process = subprocess.Popen([browser(), *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tab = until(lambda: [tab for tab in fetch(f"http://127.0.0.1:{port}/json") if tab["type"] == "page"], 60)[0]
        self.socket, self.number = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=600), 0

    def call(self, method: str, **params) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return answer.get("result", {})

    def js(self, code: str):
        """The value of an expression or of a promise."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise SystemExit(f"Error: in the browser: {answer['exceptionDetails'].get('exception', {}).get('description', answer)}")
        return answer.get("result", {}).get("value")

    def picture(self, name: str) -> None:
        if os.environ.get("SHOTS"):
            Path(os.environ["SHOTS"], name).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def with_parameters(notebook: Path, values: dict) -> None:
    """The parameters cell with other defaults, as somebody edits it."""
    found = json.loads(notebook.read_text())
    cell = next(cell for cell in found["cells"] if "parameters" in cell["metadata"].get("tags", []))
    lines = "".join(cell["source"]).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.AnnAssign) and node.target.id in values:
            lines[node.lineno - 1] = f"{node.target.id}: {ast.unparse(node.annotation)} = {values[node.target.id]!r}"
    cell["source"] = "\n".join(lines).splitlines(keepends=True)
    notebook.write_text(json.dumps(found))


def run_all(page: Page, name: str, seconds: float) -> dict:
    """Opens a notebook, runs all of its cells, saves it; returns it as it was saved."""
    page.js(f"window.jupyterapp.commands.execute('docmanager:open', {{path: 'notebooks/{name}'}}).then(w => w.context.sessionContext.ready).then(() => true)")
    current = "window.jupyterapp.shell.currentWidget"
    begun = time.monotonic()
    page.js("window.finished = null; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.finished = 'done', e => window.finished = String(e)); true")
    until(lambda: page.js("window.finished"), seconds, 2)
    until(lambda: page.js(f"{current}.context.sessionContext.session.kernel.status") == "idle", 60)
    page.js(f"{current}.context.save().then(() => true)")
    print(f"{name}: all cells run in {time.monotonic() - begun:.0f} s", flush=True)
    return page.js(f"{current}.context.model.toJSON()")


def errors(notebook: dict) -> list[str]:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    wrong = [f"{out['ename']}: {out['evalue']}" for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    return wrong + [f"a cell did not run: {''.join(cell['source'])[:60]}" for cell in code if not cell["execution_count"] and "".join(cell["source"]).strip()]


def play(page: Page, name: str) -> list[str]:
    """Types into the widgets that a notebook shows, as somebody at it does; what they did not do."""
    marked, field, value, told = {
        "sae_training.ipynb": ("looking.stepper(", ".widget-text input[type=text]", "my own name", "my own name"),
        "patch_neurons.ipynb": ("looking.panel(", "input[placeholder^=numbers]", "5", "latents: [5]"),
    }[name]
    current = "window.jupyterapp.shell.currentWidget"
    index = page.js(f"{current}.content.widgets.findIndex(cell => cell.model.sharedModel.getSource().startsWith({json.dumps(marked)}))")
    page.js(f"{current}.content.activeCellIndex = {index}; {current}.content.scrollToItem({index}, 'center').then(() => true)")
    cell = f"{current}.content.widgets[{index}].node"
    until(lambda: page.js(f"Boolean({cell}.querySelector({json.dumps(field)}))"), 30)
    page.js(f"""(() => {{ const field = {cell}.querySelector({json.dumps(field)}); field.value = {json.dumps(value)};
        for (const event of ["input", "change"]) field.dispatchEvent(new Event(event, {{ bubbles: true }})); field.blur(); return true; }})()""")
    texts = f"[{cell}.textContent, ...[...{cell}.querySelectorAll('textarea')].map(area => area.value)].join(' ')"
    try:
        until(lambda: told in page.js(texts), 60)
    except SystemExit:
        return [f"{told!r} does not come after {value!r} was typed: {page.js(texts)[:300]}"]
    return []


def in_lab(folder: Path) -> list[str]:
    """What was wrong in a copy of the project in `folder`."""
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("tiny-model", "tiny-world"):
        shutil.copytree(ROOT / "runs" / name, folder / "runs" / name)
    with_parameters(folder / "notebooks" / "sae_training.ipynb", TRAIN)
    with_parameters(folder / "notebooks" / "patch_neurons.ipynb", PATCH)
    port, wrong = free_port(), []
    env = os.environ | {"PYTHONPATH": f"{folder}:{folder}/notebooks", "HF_HUB_OFFLINE": "1", "JUPYTER_CONFIG_DIR": f"{folder}/.jupyter", "IPYTHONDIR": f"{folder}/.ipython"}
    flags = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], env=env, stdout=log, stderr=log)
    page = None
    try:
        until(lambda: fetch(f"http://127.0.0.1:{port}/api"), 60)
        page = Page(f"http://127.0.0.1:{port}/lab", f"{folder}/.chromium")
        until(lambda: page.js("Boolean(window.jupyterapp && window.jupyterapp.shell)"), 120)
        page.js("window.jupyterapp.restored.then(() => true)")
        for name, done in (("sae_training.ipynb", "runs/lab/.done"), ("patch_neurons.ipynb", "runs/lab/patches/lab/.done")):
            wrong += errors(run_all(page, name, 900))
            page.picture(name.replace(".ipynb", ".png"))
            wrong += [] if (folder / done).exists() else [f"{done} is not there"]
            wrong += [f"{name}: {what}" for what in play(page, name)]
            page.picture(name.replace(".ipynb", "-played.png"))
        state = lambda: {file: file.read_bytes() for file in sorted((folder / "runs/lab").rglob("*")) if file.is_file()}
        before = state()
        again = run_all(page, "sae_training.ipynb", 900)  # a finished run opens again
        wrong += errors(again) + ([] if state() == before else ["a second Run All touched a file of the run"])
        wrong += [] if "is looked at again" in json.dumps(again) else ["a finished run was not opened again"]
        wrong += [] if "my own name" in (folder / "runs/lab/labels.csv").read_text() else ["a name given in the notebook is not in labels.csv"]
    finally:
        if page:
            page.close()
        server.terminate()
        server.wait(20)
    return wrong


def main() -> None:
    if not browser():
        raise SystemExit("Error: no chromium is installed here: this needs one.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if wrong := in_lab(Path(folder)):
            raise SystemExit("Error: " + "; ".join(wrong))
    print("both notebooks run from end to end in JupyterLab")


if __name__ == "__main__":
    main()
