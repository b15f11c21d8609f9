"""The look of the report page: one style sheet, two palettes, phone, desktop and paper.

Colours are variables because the charts use them too, and light or dark is the reader's setting and not ours. Blue
(identified) and orange (random) stay apart for every common kind of colour blindness. `report.py` puts it in the page.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1b1d1f; --soft: #5a6066; --rule: #dcdcd6;
  --cell: #eceee9; --one: #0b5c9e; --two: #b8500a; --three: #2e77a6; --over: #ffffff; --mid: #1b1d1f;
  --four: #2f7d4f; --five: #7a4fa0; --six: #a8325a; --seven: #6f6a14; --eight: #00757a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121416; --card: #1b1e21; --ink: #e8e8e4; --soft: #a3a9af; --rule: #33383d;
    --cell: #282c30; --one: #74b8f0; --two: #f0984f; --three: #b5d8f5; --over: #000000; --mid: #000000;
    --four: #7fcf9c; --five: #c9a5ea; --six: #f291ae; --seven: #d8d572; --eight: #66d1d4;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 17px; line-height: 1.35; margin: 0 0 4px; }
p { margin: 0 0 12px; }
header p { max-width: 68ch; font-size: 17px; }
header .over { color: var(--soft); font-size: 14px; margin-bottom: 6px; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
.mono, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 0 32px;
  margin: 26px 0; padding: 14px 0; border: solid var(--rule); border-width: 1px 0;
}
.tiles div { padding: 6px 0; }
.tiles dt { color: var(--soft); font-size: 14px; }
.tiles dd { margin: 0; }
.tiles .big { font-size: 34px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles .one { color: var(--one); }
.tiles .two { color: var(--two); }

.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
.card {
  margin: 0; padding: 18px 20px 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
}
.wide { grid-column: 1 / -1; }
.card svg { display: block; width: 100%; max-width: 440px; height: auto; margin: 12px auto 4px; }
.card svg.key { max-width: 290px; margin: 0 auto 6px; }
details { margin-top: 10px; font-size: 14px; }
summary { cursor: pointer; color: var(--soft); }

svg text { font-family: inherit; fill: var(--ink); font-size: 12px; }
svg .tick, svg .axis { fill: var(--soft); }
svg .label { font-weight: 600; font-size: 12.5px; }
svg .value { font-variant-numeric: tabular-nums; }
svg .small { font-size: 9.5px; }
svg .label, svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
svg .over { fill: var(--over); }
svg .mid { fill: var(--mid); }
svg .one { --tone: var(--one); }
svg .two { --tone: var(--two); }
svg .three { --tone: var(--three); }
svg .four { --tone: var(--four); }
svg .five { --tone: var(--five); }
svg .six { --tone: var(--six); }
svg .seven { --tone: var(--seven); }
svg .eight { --tone: var(--eight); }
svg .ref { --tone: var(--soft); }
svg .label { fill: var(--tone, var(--ink)); }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .base { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; }
svg .line.ref { stroke-dasharray: 5 3; }
svg .line.dash { stroke-dasharray: 2 3; }
svg .mark { fill: var(--tone); stroke: var(--card); stroke-width: 1.5; }
svg .mark.dash { fill: var(--card); stroke: var(--tone); stroke-width: 2; }
svg .dots { fill: none; stroke: var(--tone); stroke-width: 1; opacity: 0.7; }
svg .bar { fill: var(--tone); }
svg .hollow { fill: none; stroke: var(--two); stroke-width: 1.75; }
svg .cell { fill: var(--cell); }
svg .heat { fill: var(--one); }
svg .void { fill: none; stroke: var(--rule); stroke-dasharray: 2 2; }
svg .ring { fill: none; stroke: var(--ink); }
svg .dot { fill: var(--ink); }
svg .dot.over { fill: var(--over); }
svg .dot.mid { fill: var(--mid); }
.whole { white-space: nowrap; }

.legend, .bars, nav ul { list-style: none; margin: 0; padding: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-top: 4px; font-size: 13.5px; }
.legend li { display: flex; align-items: center; gap: 7px; }
.card .legend svg { width: 24px; height: 14px; margin: 0; flex: none; }
.bars { margin-top: 10px; font-size: 14px; font-variant-numeric: tabular-nums; }
.bars li {
  display: grid; grid-template-columns: minmax(8em, 16em) minmax(0, 1fr) 6em; gap: 12px; align-items: center;
  padding: 3px 0;
}
.bars .track { background: var(--cell); border-radius: 3px; height: 12px; }
.bars .track span { display: block; background: var(--one); border-radius: 3px; height: 100%; }
.bars li > :last-child { text-align: right; }
nav { margin: 0 0 8px; font-size: 15px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 20px; }
a { color: var(--one); }
section { margin-top: 34px; }
section > h2 { font-size: 21px; margin-bottom: 2px; }
section > p { color: var(--soft); max-width: 72ch; }
h3 { font-size: 16px; line-height: 1.35; margin: 0 0 4px; }
h4 { font-size: 14px; font-weight: 600; line-height: 1.35; margin: 0; }
.many {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px 22px;
  margin-top: 10px;
}
.many p { margin: 0; font-size: 13.5px; color: var(--soft); }
.many svg { margin: 4px 0 0; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 6px 0; }
th, td { text-align: right; padding: 5px 0 5px 14px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
thead th { white-space: normal; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); font-weight: 400; }
tr.one th { color: var(--one); }
tr.two th { color: var(--two); }
tr.sum th, tr.sum td { color: var(--soft); border-bottom: 0; }

.talk { margin: 10px 0 4px; }
.talk dt { color: var(--soft); font-size: 14px; }
.talk dd { margin: 0 0 8px; overflow-wrap: anywhere; font-size: 14px; }
.verdict { font-weight: 600; }
.right { color: var(--one); }
.wrong { color: var(--two); }
.facts { display: grid; grid-template-columns: 11em minmax(0, 1fr); gap: 3px 20px; font-size: 14px; margin: 8px 0 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 8px 0 0; }

@media screen and (max-width: 760px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 25px; }
  .grid { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .card { padding: 14px 14px 12px; }
  tbody th { white-space: normal; min-width: 7em; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 16px; }
  .facts { grid-template-columns: minmax(0, 1fr); }
  .bars li { grid-template-columns: minmax(0, 1fr) 5em; gap: 2px 10px; }
  .bars .track { grid-row: 2; grid-column: 1 / -1; }
  .facts { gap: 0; }
  .facts dd { margin-bottom: 8px; }
  table { font-size: 13px; }
  th, td { padding-left: 9px; }
}
@media print {
  :root {
    --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --rule: #cccccc;
    --cell: #eeeeee; --one: #0b5c9e; --two: #b8500a; --three: #2e77a6; --over: #ffffff; --mid: #000000;
    --four: #2f7d4f; --five: #7a4fa0; --six: #a8325a; --seven: #6f6a14; --eight: #00757a;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .card, .tiles div, .many > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  nav { display: none; }
  details:not([open]) { display: none; }
}
"""
