"""The look of the report: calm, readable at any width, in light and dark, on screen and on paper."""

STYLE = """
:root {
  --page: #ffffff; --text: #1d2329; --muted: #5f6b76; --line: #e3e7ea; --soft: #f4f6f8;
  --link: #0072b2; --better: #00734f; --worse: #b34700;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #171b20; --text: #e6e9ec; --muted: #98a3ad; --line: #2b3239; --soft: #1e242a;
    --link: #56b4e9; --better: #2fc39a; --worse: #e69f00;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
h4 { font-size: 12px; margin: 0 0 6px; font-weight: 500; color: var(--muted); }
p { margin: 0 0 12px; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 12px; overflow-wrap: anywhere; user-select: all; }
pre { font-size: 12.5px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.eyebrow { margin: 0 0 4px; color: var(--muted); font-size: 12px; letter-spacing: 0.08em; text-transform: uppercase; }
.lede { font-size: 17px; margin-bottom: 6px; }
.facts, .note, figcaption, small { color: var(--muted); font-size: 13px; }
.note { margin-top: 10px; max-width: 110ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 20px; }
.tile { background: var(--soft); border-radius: 8px; padding: 12px 14px; display: flex; flex-direction: column; }
.tile span { color: var(--muted); font-size: 12.5px; }
.tile b { font-size: 21px; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile small { font-size: 12px; min-height: 18px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); font-size: 12.5px; white-space: nowrap;
  padding: 6px 10px; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: 7px 10px; border-top: 1px solid var(--line); white-space: nowrap; }
tbody tr:first-child td { border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { font-weight: 500; }
table.prose th, table.prose td { text-align: left; white-space: normal; }
tr.address td { border-top: 0; padding: 0 0 9px; white-space: normal; color: var(--muted); font-weight: 400;
  font-size: 12px; line-height: 1.4; }
.better { color: var(--better); } .worse { color: var(--worse); }
figure { margin: 0 0 30px; }
.note + figure, details + figure { margin-top: 30px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 4px; }
details { margin: 12px 0; border: 1px solid var(--line); border-radius: 8px; padding: 9px 14px; }
summary { cursor: pointer; font-size: 14px; }
details[open] summary { margin-bottom: 10px; }
.sample { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 24px; padding: 16px 0;
  border-top: 1px solid var(--line); }
.sample:first-of-type { border-top: 0; padding-top: 0; }
.prompt { grid-column: 1 / -1; color: var(--muted); }
.lineage { padding-left: 22px; margin: 0 0 16px; } .lineage li { margin-bottom: 12px; }
@media (max-width: 640px) { main { padding: 24px 16px 48px; } .sample { grid-template-columns: 1fr; } }
@media print {
  @page { margin: 16mm 14mm; }
  main { max-width: none; padding: 0; } nav { display: none; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .sample, .tile, .lineage li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  h2 { margin-top: 28px; } .scroll { overflow: visible; } table { font-size: 8.5pt; }
  details.printed::details-content { content-visibility: visible; block-size: auto; }
}
"""
