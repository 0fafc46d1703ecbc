"""The page's style: one column, readable on a telephone, on paper and in the dark."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --soft: #5b6570; --line: #dde2e7;
  --fill: #2f6db0; --pale: #c3cad2; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --ink: #e8ebee; --soft: #9aa5b1;
  --line: #31383f; --fill: #6ba6e6; --pale: #4c5660; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 48px; max-width: 1120px; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin: 20px 0 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 21px; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.map { position: relative; width: 100%; aspect-ratio: 5 / 2; margin-top: 8px; }
.map.tall { display: none; aspect-ratio: 4 / 5; }
.map div { position: absolute; overflow: hidden; padding: 3px 5px; font-size: 11px;
  line-height: 1.3; border: 1px solid var(--back); }
.map b { display: block; font-weight: 600; overflow-wrap: anywhere; }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; margin-top: 8px; font-size: 13px;
  color: var(--soft); }
.key i { display: inline-block; width: 14px; height: 14px; margin-right: 5px; vertical-align: -2px;
  border: 1px solid var(--line); }
.chart { display: grid; grid-template-columns: 44px 1fr; margin-top: 12px; }
.chart small { color: var(--soft); text-align: right; padding-right: 8px; display: flex;
  flex-direction: column; justify-content: space-between; line-height: 1; }
.chart svg { display: block; width: 100%; height: 110px; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.chart em { grid-column: 2; font-style: normal; font-size: 13px; color: var(--soft); }
svg .bar { fill: var(--fill); } svg .bar:hover { fill: var(--ink); }
svg .before { fill: var(--pale); } svg .after { fill: none; stroke: var(--fill); stroke-width: 1.3;
  vector-effect: non-scaling-stroke; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 24px;
  margin-top: 12px; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: 120px;
  border-bottom: 1px solid var(--line); }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
figcaption span, .ends { color: var(--soft); font-size: 12px; }
.ends { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; margin-top: 8px; }
th { text-align: left; font-size: 13px; color: var(--soft); font-weight: 500; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
td:first-child { overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
td:not(:first-child) { width: 15%; min-width: 100px; white-space: nowrap; }
td u { display: block; height: 5px; margin-top: 4px; background: var(--line); }
td u i { display: block; height: 5px; background: var(--fill); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 0; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 640px) {
  .map { display: none; } .map.tall { display: block; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  table, tbody { display: block; } thead { display: none; }
  tr { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 2px 14px; padding: 9px 0;
    border-bottom: 1px solid var(--line); }
  td { border: 0; padding: 0; } td:first-child { grid-column: 1 / -1; }
  td:not(:first-child) { width: auto; min-width: 0; }
  td[data-name]::before { content: attr(data-name); display: block; color: var(--soft);
    font-size: 11px; }
}
"""
