"""The report's style sheet: narrow and wide, light and dark, on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #16191d; --soft: #545b64; --paper: #fff; --raised: #f5f6f8; --rule: #d5d9de; --link: #005a8c;
  --blue: #0072b2; --orange: #b36b00; --green: #00805e; --vermillion: #c94f00; --purple: #a8447f; --black: #16191d;
  --sky: #2b8cc4; --alarm: #a33a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e8eaed; --soft: #a9b0ba; --paper: #14171a; --raised: #1e2226; --rule: #3a4047; --link: #7cc4f0;
    --blue: #56b4e9; --orange: #e69f00; --green: #2fc89b; --vermillion: #ff8a4a; --purple: #e39bc4; --black: #f4f5f6;
    --sky: #9ad2f2; --alarm: #ff9b66;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1340px; padding: 16px; color: var(--text); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.4rem; margin: 40px 0 12px; padding-top: 12px; border-top: 2px solid var(--rule); }
h3 { font-size: 1.15rem; margin: 28px 0 10px; }
h4 { font-size: 1rem; margin: 20px 0 8px; }
p, ul { margin: 0 0 12px; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 12px 0 0; padding: 0; }
.soft, .note { color: var(--soft); }
.note { font-size: .85rem; margin: 4px 0 0; }
.alarm { border-left: 4px solid var(--alarm); padding: 4px 0 4px 12px; list-style: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px 20px; }
.facts, .thumbs { margin: 0 0 16px; }
.facts dt { color: var(--soft); font-size: .85rem; }
.facts dd { margin: 0; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 28px 28px; }
figure { margin: 0; min-width: 0; }
.plot figcaption { font-weight: 600; }
.plot svg:not(.sample) { display: block; width: 100%; max-width: 640px; height: auto; }
.plot > p:not(.note) { color: var(--soft); padding: 20px 0; }
section > .legend { margin-bottom: 14px; }
.plots + .scroll, .plots + p, .plots + details { margin-top: 24px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; list-style: none; margin: 0; padding: 0; font-size: .85rem; }
.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; }
.sample { width: 36px; height: 14px; flex: none; }
.sample.short { width: 12px; }
svg text { font-size: 13px; fill: var(--soft); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: .7; } .tick, .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.mark { stroke: var(--purple); stroke-width: 1.6; stroke-dasharray: 7 4; fill: none; }
.mark.again { stroke-dasharray: 1.6 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { stroke-width: 1.6; fill: var(--paper); }
.tip { fill: transparent; stroke: none; }
.blue { stroke: var(--blue); } .orange { stroke: var(--orange); } .green { stroke: var(--green); }
.vermillion { stroke: var(--vermillion); } .purple { stroke: var(--purple); } .black { stroke: var(--black); }
.sky { stroke: var(--sky); }
.scroll { overflow-x: auto; margin: 0 0 16px; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; width: max-content; }
caption { text-align: left; color: var(--soft); padding: 0 0 6px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); }
td, tbody th { max-width: min(420px, 70vw); }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: 0 0 14px; }
summary { cursor: pointer; color: var(--link); padding: 4px 0; }
pre { background: var(--raised); padding: 12px; margin: 8px 0; font-size: .85rem; white-space: pre-wrap; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 16px 12px; }
.thumbs img, .thumbs .lost { display: block; width: 96px; height: 96px; background: var(--raised); }
.thumbs img { object-fit: contain; }
.thumbs .lost { color: var(--soft); font-size: .8rem; padding: 8px; }
.thumbs .small { image-rendering: pixelated; }
.thumbs figcaption { font-size: .8rem; line-height: 1.35; margin-top: 4px; }
.thumbs b, .thumbs span { display: block; }
.thumbs span { color: var(--soft); }
@media print {
  body { max-width: none; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
