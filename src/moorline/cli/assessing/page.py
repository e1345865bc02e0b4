"""An assessment as one HTML page: no script, nothing loaded from anywhere, everything from the machine escaped."""

from __future__ import annotations

from html import escape
from typing import Final

from moorline.clock import rendered
from moorline.policy.sec009.assessment import AssessedCapability, Assessment

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE: Final = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;
border-bottom:1px solid #d8dee4}th{background:#f3f5f7}code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.met{color:#116329}.not_met{color:#a40e26}.declared{color:#7d4e00}.not_probed{color:#0550ae}.service{color:#57606a}
details{margin-top:.2rem}summary{cursor:pointer;color:#57606a}ul{margin:.2rem 0 .2rem 1.2rem;padding:0}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th{background:#161b22}th,td{border-color:#30363d}
.met{color:#3fb950}.not_met{color:#ff7b72}.declared{color:#d29922}.not_probed{color:#79c0ff}}
"""


def render(found: Assessment) -> str:
    """The page."""
    host = escape(found.host)
    parts = [
        "<!doctype html>\n",
        f'<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">',
        f"<title>SEC009 assessment of {host}</title><style>{_STYLE}</style></head><body>",
        f"<h1>SEC009 assessment of {host}</h1>",
        f"<p>{escape(rendered(found.at))}, {'as root' if found.privileged else 'not as root'}. ",
        "What a machine says of itself is asserted at most; an attestation authority on another machine proves more.</p>",
        f"<p>Approach, derived from the measures: <strong>{escape(found.approach)}</strong></p>",
        "<h2>Use cases</h2><table><tr><th>use case</th><th>may host</th><th>missing</th><th>fewest changes</th></tr>",
    ]
    for case in found.use_cases:
        steps = "".join(
            f"<li>{escape(change.says)} ({escape(change.effort)})<br><code>{escape(change.how)}</code></li>"
            for change in case.roadmap
        )
        word = '<span class="met">yes</span>' if case.may_host else '<span class="not_met">not yet</span>'
        parts.append(
            f'<tr id="case-{escape(case.id)}"><td>{escape(case.id)} {escape(case.title)}</td><td>{word}</td>'
            f"<td>{escape(', '.join(case.missing))}</td><td><ul>{steps}</ul></td></tr>"
        )
    parts.append("</table><h2>Measures</h2><table><tr><th>measure</th><th>status</th><th>by</th></tr>")
    parts.extend(
        f'<tr id="measure-{escape(one.id)}"><td>{escape(one.id)} {escape(one.title)}</td>'
        f'<td class="{one.status.value}">{one.status.value}</td><td>{escape(", ".join(one.by))}</td></tr>'
        for one in found.measures
    )
    parts.append(
        "</table><h2>Capabilities</h2><table><tr><th>capability</th><th>status</th><th>level</th><th>class</th><th>found</th></tr>"
    )
    parts.extend(_capability(one) for one in found.capabilities)
    parts.append("</table></body></html>\n")
    return "".join(parts)


def _capability(one: AssessedCapability) -> str:
    said = ": ".join(part for part in (one.value, one.reason) if part) or "-"
    lines = "".join(f"<li><code>{escape(line)}</code></li>" for line in one.evidence)
    evidence = f"<details><summary>evidence</summary><ul>{lines}</ul></details>" if lines else ""
    improve = f"<p>Improve: {escape(one.improve)}</p>" if one.improve else ""
    return (
        f'<tr id="{escape(one.id)}"><td><code>{escape(one.id)}</code></td>'
        f'<td class="{one.status.value}">{one.status.value}</td>'
        f"<td>{one.assurance.word}, root {one.root.value}</td><td>{one.variability}, {one.attestable.replace('_', ' ')}</td>"
        f"<td>{escape(said)}{improve}{evidence}</td></tr>"
    )
