"""The style of a page: on paper and phones, in the light and in the dark."""

from __future__ import annotations

# Shades of one hue, so that more bytes are farther from the background in either theme, whatever
# colours a reader sees. What is not trained differs in shape as well: it is hollow.
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --quiet: #5a6472; --page: #ffffff; --line: #d5dae1;
  --panel: #f4f6f9; --s1: #bcd3ee; --s2: #8db3e0; --s3: #5c90cd; --s4: #356db0; --s5: #164a86;
  --hollow: #b4540a; --warn: #a33c00; --link: #164a86; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --quiet: #a2acba; --page: #12161c; --line: #333b47; --panel: #1b2129;
    --s1: #23405f; --s2: #2f5e8f; --s3: #3f7fbf; --s4: #6aa5e0; --s5: #aed2f7; --hollow: #f0a050;
    --warn: #ffab70; --link: #aed2f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; } .quiet { color: var(--quiet); font-size: 0.9rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 0.5rem 0; }
dl.facts dt { color: var(--quiet); } dl.facts dd { margin: 0; }
ul.findings { padding: 0; list-style: none; }
ul.findings li { border-left: 4px solid var(--line); background: var(--panel); padding: 0.4rem 0.75rem;
  margin: 0.4rem 0; }
ul.findings li.warning { border-color: var(--warn); } li.warning b { color: var(--warn); }
.wide { overflow-x: auto; }
.wide:focus-visible, summary:focus-visible { outline: 3px solid var(--s3); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: 0.25rem; }
th, td { padding: 0.15rem 0.75rem 0.15rem 0; text-align: left; white-space: nowrap; vertical-align: middle; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; }
th[scope=row] { font-weight: 400; } .n { text-align: right; }
td.ids { white-space: normal; min-width: 8rem; }
table.map { width: 100%; } table.map th, table.map td { padding-right: 0.5rem; }
table.map th, table.map td.n { overflow-wrap: normal; }
table.names th[scope=row] { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
table.map td.cells, table.map th.cells { width: 100%; padding: 1px 0.5rem 1px 0; }
.map svg { display: block; width: 100%; height: 1.1rem; background: var(--panel);
  border: 1px solid var(--line); forced-color-adjust: none; }
.ticks { position: relative; height: 1.2rem; } .ticks span { position: absolute; font-size: 0.75rem;
  color: var(--quiet); font-weight: 400; }
.bar { display: inline-block; width: 6rem; height: 0.7rem; background: var(--panel);
  border: 1px solid var(--line); vertical-align: middle; margin-right: 0.5rem; forced-color-adjust: none; }
.s0 { fill: none; stroke: var(--hollow); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); } .s4 { fill: var(--s4); }
.s5 { fill: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; padding: 0; list-style: none;
  font-size: 0.85rem; } .legend svg { width: 1.4rem; height: 0.9rem; vertical-align: -0.1rem;
  background: var(--panel); border: 1px solid var(--line); forced-color-adjust: none; }
ol.path { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; padding: 0; list-style: none; margin: 0.5rem 0; }
ol.path li { position: relative; flex: 1 1 12rem; border: 1px solid var(--line); background: var(--panel);
  border-radius: 0.4rem; padding: 0.5rem 0.75rem; }
ol.path li + li::before { content: "\\2192"; position: absolute; left: -1.6rem; top: 0.5rem; }
ol.path b { display: block; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--link); }
article + article { margin-top: 3rem; border-top: 3px double var(--line); padding-top: 1rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.5rem; }
@media (max-width: 75rem) { .bar { width: 4rem; } }
@media (max-width: 40rem) { body { padding: 0.75rem; } .bar { width: 3rem; }
  td.ids { min-width: 5rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 0.4rem; }
  table.map th, table.map td { padding-right: 0.35rem; } .map .spare { display: none; }
  table.names th[scope=row] { min-width: 7rem; }
  ol.path { flex-direction: column; gap: 1.75rem; } ol.path li { flex: none; }
  ol.path li + li::before { content: "\\2193"; left: 1rem; top: -1.6rem; } }
@media print { .wide { overflow: visible; } }
"""
