"""A document as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

from html import escape

from dualtoken_deploy.prove import svg
from dualtoken_deploy.prove.document import Bars, Block, Document, Table

# Nothing is fetched: no font, no script, no picture but the SVG inside.
STYLE = """
:root{color-scheme:light dark;--ink:#1b2330;--soft:#5b6675;--paper:#fbfbf9;--edge:#d9dce1;--mark:#2463a8;--at:#b3261e}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9ee;--soft:#9aa5b4;--paper:#14181e;--edge:#333b46;--mark:#7db4f0;--at:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:52rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem;padding-bottom:.2rem;border-bottom:1px solid var(--edge)}
p{margin:.5rem 0;overflow-wrap:anywhere}.lead{color:var(--soft)}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--edge)}
th{color:var(--soft);font-weight:600}td{overflow-wrap:break-word}td:nth-child(2):last-child{overflow-wrap:anywhere}
td:first-child{color:var(--soft);min-width:7rem}
td:not(:first-child){font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;margin:.6rem 0}
svg text{fill:var(--ink);font-size:13px}svg .small{font-size:11px;fill:var(--soft)}
.bar,.dot{fill:var(--mark)}.line{stroke:var(--ink);fill:none;stroke-width:1.5}.axis{stroke:var(--edge);fill:none}
.at{stroke:var(--at);fill:none;stroke-dasharray:4 3}figure{margin:0;overflow-x:auto}
@media(max-width:40rem){.bars{width:36rem}.points text{font-size:22px}.points .small{font-size:20px}}
figcaption{color:var(--soft);font-size:.9rem}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html(document: Document) -> str:
    """One page without links to anywhere; it may be opened from a file or put on a server."""
    body = "".join(
        f"<section><h2>{escape(s.title)}</h2>{''.join(map(_html_block, s.blocks))}</section>" for s in document.sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(document.title)}</h1>\n<p class="lead">{escape(document.lead)}</p>\n{body}\n'
        "</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in block.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in block.rows)
        heading = f"<thead><tr>{head}</tr></thead>" if any(block.columns) else ""
        return f'<div class="table"><table>{heading}<tbody>{rows}</tbody></table></div>'
    drawn = svg.bars(block) if isinstance(block, Bars) else svg.points(block)
    return f"<figure><figcaption>{escape(block.title)}</figcaption>{drawn}</figure>"


def markdown(document: Document) -> str:
    """Text and tables; a chart is the table of its figures."""
    parts = [f"# {_text(document.title)}", _text(document.lead)]
    for section in document.sections:
        parts += [f"## {_text(section.title)}", *(_markdown_block(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return _text(block)
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Bars):
        rows = tuple((b.label, f"{b.value:.3g} {block.unit}", f"{b.low:.3g} to {b.high:.3g}") for b in block.bars)
        return _markdown_table(Table((block.title, "median", "from to"), rows))
    rows = tuple((said, f"{x:.4g}", f"{y:.4g}") for x, y, said in block.points)
    return _markdown_table(Table((block.title, block.x, block.y), rows))


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    """In one line, and no markup in it."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("<", "&lt;").replace("`", "\\`").replace("*", "\\*").replace("[", "\\[")
