"""`make test-browser`: features.html in a real browser, without a window or a network.

    python tests/browser.py PAGE

A copy of the page gets a script that searches for a token, opens a latent, sorts and steps with the
keyboard, and writes what it saw into the document; the browser prints that.
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
    seen.all = document.querySelectorAll("#rows tr").length;
    const word = document.querySelector("#rows .token").textContent, search = document.getElementById("search");
    seen.word = word;
    search.value = word; search.oninput();
    seen.found = document.querySelectorAll("#rows tr").length;
    seen.each_has_it = [...document.querySelectorAll("#rows tr")].every(r => r.textContent.toLowerCase().includes(word.toLowerCase()));
    document.querySelector("#rows button").click();
    seen.opened = document.querySelector("#one h2").textContent;
    seen.contexts = document.querySelectorAll("#one .context").length;
    seen.shaded = [...document.querySelectorAll("#one .context span, #one .context b")].filter(e => e.style.background).length;
    search.value = ""; search.oninput();
    document.querySelector('button[data-by="latent"]').click();
    const first = document.querySelector("#rows button").textContent;
    document.querySelector("#rows button").click();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
    seen.stepped = [first, document.querySelector("#one h2").textContent];
    search.value = "no such token \\u0000"; search.oninput();
    seen.none = document.querySelectorAll("#rows tr").length;
  } catch (error) { seen.errors.push(String(error)); }
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
}, 20);
</script>
"""


def look(page: Path) -> dict:
    """What the script saw on the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        raise SystemExit("Error: no chromium is installed here: `make test-browser` needs one.")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text(encoding="utf-8").replace("</html>", DRIVER + "</html>"), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", f"--user-data-dir={folder}/profile", "--dump-dom"]
        dom = subprocess.run([browser, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL).group(1)))


def main() -> None:
    page = Path(sys.argv[1])
    seen = look(page)
    print(json.dumps(seen, indent=1, ensure_ascii=False))
    wrong = seen["errors"] + [
        f"{name} is {seen.get(name)}"
        for name, right in {
            "all": seen.get("all", 0) > 0, "found": 0 < seen.get("found", 0) <= seen.get("all", 0), "each_has_it": seen.get("each_has_it"),
            "opened": str(seen.get("opened")).startswith("Latent "), "contexts": seen.get("contexts", 0) > 0, "shaded": seen.get("shaded", 0) > 0,
            "stepped": seen.get("stepped", [0, 0])[0] != str(seen.get("stepped", [0, 0])[1]).removeprefix("Latent "), "none": seen.get("none") == 0,
        }.items()
        if not right
    ]  # fmt: skip
    if wrong:
        raise SystemExit("Error: " + "; ".join(wrong))
    print(f"{page.name}, {page.stat().st_size / 1e6:.1f} MB: searched, opened, sorted and stepped through without an error")


if __name__ == "__main__":
    main()
