"""`make test-browser`: features.html in a real browser, without a window or a network.

    python tests/browser.py PAGE [WORD]

A copy of the page gets a script that searches for a word (WORD, or two neighbouring tokens of a context), opens a
latent, sorts and steps with the keyboard, and writes what it saw into the document; the browser prints that.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DRIVER = """
<script>
const seen = { errors: [] };
window.addEventListener("error", e => seen.errors.push(String(e.message)));
window.addEventListener("unhandledrejection", e => seen.errors.push(String(e.reason)));
const begun = performance.now();
const wait = setInterval(() => {
  if (!document.body.dataset.ready) return;
  clearInterval(wait);
  try {
    seen.ready_ms = Math.round(performance.now() - begun);
    const all = what => [...document.querySelectorAll(what)], search = document.getElementById("search");
    const rows = () => all("#rows tr:not(.group)"), groups = () => all("#rows tr.group").map(e => e.textContent);
    const look_for = word => { search.value = word; const from = performance.now(); search.oninput(); return Math.round(performance.now() - from); };
    const contexts = () => all("#one .context").map(line => [...line.querySelectorAll(".token")].filter(e => !e.matches(".quiet")).map(e => e.textContent).join(""));
    seen.all = rows().length;
    rows()[0].querySelector("button").click();
    seen.opened = document.querySelector("#one h2").textContent;
    seen.contexts = contexts();
    seen.peaks = all("#one .context .peak").map(e => e.textContent);
    seen.values = all("#one .context .peak").map(e => Number(e.dataset.value));
    seen.said = all("#one .context .value").map(e => Number(e.textContent));
    seen.shaded = all("#one .context .token").every(e => Boolean(e.style.background) === Boolean(e.dataset.value));
    seen.wide = all("#one .token").filter(e => e.getBoundingClientRect().right > innerWidth).length;
    const range = document.createRange(), line = document.querySelector("#one .context");
    range.setStartAfter(line.firstChild); range.setEndAfter(line.lastChild);
    getSelection().removeAllRanges(); getSelection().addRange(range);
    seen.copied = String(getSelection());

    const tokens = [...line.querySelectorAll(".token")], peak = tokens.findIndex(e => e.matches(".peak")), next = Math.max(1, peak);
    const word = WORD || (tokens[next - 1].textContent + tokens[next].textContent).trim();
    seen.word = word;
    seen.first_search_ms = look_for(word.toUpperCase());
    const listed = () => rows().map(e => e.querySelector("button").textContent), upper = listed();
    seen.found = upper.slice(0, 10); seen.groups = groups();
    seen.search_ms = look_for(word);
    seen.same = String(listed()) === String(upper);
    if (rows().length) rows()[0].querySelector("button").click();
    seen.has_it = contexts().some(text => text.toLowerCase().includes(word.toLowerCase()));

    look_for("");
    document.querySelector('button[data-by="latent"]').click();
    const first = document.querySelector("#rows button").textContent;
    document.querySelector("#rows button").click();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
    seen.stepped = [first, document.querySelector("#one h2").textContent];
    look_for("no such token \\u0000");
    seen.none = all("#rows tr").length;
  } catch (error) { seen.errors.push(String(error)); }
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
}, 20);
</script>
"""


def browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look(page: Path, word: str = "") -> dict:
    """What the script saw on the page."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        driver = DRIVER.replace("WORD", json.dumps(word).replace("<", "\\u003c"), 1)
        copy.write_text(page.read_text(encoding="utf-8").replace("</html>", driver + "</html>"), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
        flags += ["--virtual-time-budget=20000", f"--user-data-dir={folder}/profile", "--dump-dom"]
        dom = subprocess.run([browser(), *flags, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL).group(1)))


def mistakes(seen: dict) -> list[str]:
    """What the page should have done and did not."""
    peaks = list(zip(seen.get("values", []), seen.get("said", []), strict=True))
    return seen["errors"] + [
        f"{name} is {seen.get(name)}"
        for name, right in {
            "all": seen.get("all", 0) > 0, "opened": str(seen.get("opened")).startswith("Latent "), "contexts": bool(seen.get("contexts")),
            "peaks": len(seen.get("peaks", [])) == len(seen.get("contexts", [])), "values": all(a == b for a, b in peaks) and peaks,
            "shaded": seen.get("shaded"), "wide": seen.get("wide") == 0, "found": bool(seen.get("found")), "same": seen.get("same"), "has_it": seen.get("has_it"),
            "copied": seen.get("contexts") and seen.get("copied", "").strip() == seen["contexts"][0].strip(), "none": seen.get("none") == 0,
            "stepped": seen.get("stepped", [0, 0])[0] != str(seen.get("stepped", [0, 0])[1]).removeprefix("Latent "),
        }.items()
        if not right
    ]  # fmt: skip


def main() -> None:
    if not browser():
        raise SystemExit("Error: no chromium is installed here: `make test-browser` needs one.")
    page = Path(sys.argv[1])
    seen = look(page, *sys.argv[2:3])
    print(json.dumps(seen, indent=1, ensure_ascii=False))
    if wrong := mistakes(seen):
        raise SystemExit("Error: " + "; ".join(wrong))
    print(f"{page.name}, {page.stat().st_size / 1e6:.1f} MB: searched, opened, sorted and stepped through without an error")


if __name__ == "__main__":
    main()
