"""The look of the report page: one style sheet for light, dark, small screens and paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #faf8f5; --card: #ffffff; --ink: #1d1a18; --soft: #6b645e; --line: #e5dfd8; --faint: #f3efea;
  --lamp: #c8331b; --lamp-soft: #fdeee9; --good: #17804f; --bad: #b3261e; --focus: #2163c4;
  --k0: #c8331b; --k1: #2163c4; --k2: #138a63; --k3: #a86a00; --k4: #7a45c2; --k5: #5b6472;
  --shadow: 0 1px 2px rgb(60 30 10 / .05), 0 8px 24px -12px rgb(60 30 10 / .12);
  --sans: Inter, "Inter Variable", system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", "JetBrains Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131110; --card: #1c1917; --ink: #f1ece7; --soft: #a59c94; --line: #332d29; --faint: #241f1c;
    --lamp: #ff6a47; --lamp-soft: #33190f; --good: #4cc38a; --bad: #ff8a80; --focus: #8bb8ff;
    --k0: #ff6a47; --k1: #6ea8ff; --k2: #46c796; --k3: #e0a83c; --k4: #b892f5; --k5: #9aa5b5;
    --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans);
  text-rendering: optimizeLegibility; -webkit-font-smoothing: antialiased; }
.wrap { max-width: 1140px; margin: 0 auto; padding: 0 32px; }

header { color: #fff6f1; background: #150b08; position: relative; overflow: hidden;
  background-image:
    radial-gradient(90% 140% at 82% -10%, rgb(255 72 30 / .62), rgb(168 28 10 / .34) 38%, transparent 72%),
    radial-gradient(50% 90% at 0 120%, rgb(255 90 40 / .16), transparent 70%);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
header .wrap { padding-top: 52px; padding-bottom: 88px; }
.kicker { display: flex; align-items: center; gap: 10px; margin: 0 0 24px; font-size: 13px; font-weight: 600;
  letter-spacing: .14em; text-transform: uppercase; color: #ffb9a4; }
.kicker i { width: 10px; height: 10px; border-radius: 50%; background: #ff5a33;
  box-shadow: 0 0 0 4px rgb(255 90 51 / .22), 0 0 22px 5px rgb(255 90 51 / .75); }
h1 { margin: 0; font-size: clamp(30px, 5vw, 52px); line-height: 1.08; letter-spacing: -.026em; font-weight: 700;
  overflow-wrap: anywhere; }
header p.sub { margin: 16px 0 0; max-width: 46em; font-size: 18px; line-height: 1.5; color: #f6d9cf; }
dl.facts { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 28px 0 0; font-size: 14px; }
dl.facts div { min-width: 0; }
dl.facts dt { color: #e3a693; font-size: 12px; }
dl.facts dd { margin: 0; font-weight: 550; overflow-wrap: anywhere; }

main { padding-bottom: 72px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin-top: -50px;
  position: relative; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px 16px;
  box-shadow: var(--shadow); }
.tile b { display: block; font-size: 34px; line-height: 1.1; letter-spacing: -.03em; font-weight: 680;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { display: block; font-size: 14px; color: var(--soft); margin-bottom: 6px; }
.tile small { display: block; margin-top: 8px; font-size: 13px; line-height: 1.4; color: var(--soft); }
.tile.good b { color: var(--good); } .tile.bad b { color: var(--bad); }
.tile.lead { border-color: color-mix(in srgb, var(--lamp) 45%, var(--line)); }
.tile.lead b { color: var(--lamp); }

.skip { position: absolute; left: 16px; top: -60px; z-index: 2; padding: 10px 18px; border-radius: 0 0 10px 10px;
  background: #fff6f1; color: #150b08; font-weight: 600; }
.skip:focus { top: 0; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 4px; }
main:focus { outline: none; }
.contents { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 28px; font-size: 14px; }
.contents a { padding: 5px 14px; border: 1px solid var(--line); border-radius: 99px; color: var(--ink);
  text-decoration: none; background: var(--card); }
.contents a:hover { border-color: var(--lamp); color: var(--lamp); }

section { margin-top: 56px; scroll-margin-top: 16px; }
h2 { margin: 0 0 18px; font-size: 24px; line-height: 1.25; letter-spacing: -.018em; font-weight: 660; }
h3 { margin: 0 0 12px; font-size: 16px; font-weight: 640; text-transform: none; }
h3 small { font-weight: 450; color: var(--soft); margin-left: 8px; font-size: 14px; }
p, ul { margin: 0 0 12px; max-width: 46em; }
.prose ul { padding-left: 1.2em; } .prose li { margin: 4px 0; }
.note, figcaption { margin: 12px 0 0; font-size: 14px; line-height: 1.5; color: var(--soft); max-width: 56em; }
code { font: .9em var(--mono); background: var(--faint); padding: .12em .36em; border-radius: 5px; }
pre { margin: 0 0 12px; padding: 16px 20px; overflow-x: auto; border-radius: 12px; background: #1d1512; color: #fbe9e2;
  font: 14px/1.6 var(--mono); border: 1px solid #3a2a24; white-space: pre-wrap; overflow-wrap: anywhere; }
pre code { background: none; padding: 0; font-size: inherit; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow); }
figure { margin: 0; }
.scroll { overflow-x: auto; }

table.data { width: 100%; border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
.data th, .data td { padding: 11px 18px; text-align: left; border-top: 1px solid var(--line);
  vertical-align: baseline; }
.data thead th { border-top: 0; font-size: 13px; font-weight: 600; color: var(--soft); white-space: nowrap;
  vertical-align: bottom; }
.data thead button { all: unset; box-sizing: border-box; cursor: pointer; min-height: 24px; margin: -4px -6px;
  padding: 4px 6px; border-radius: 6px; }
.data thead button:hover { color: var(--ink); background: var(--faint); }
.data thead button:focus-visible { outline: 3px solid var(--focus); outline-offset: 0; }
.data th[aria-sort] button::after { content: "\\25B4"; display: inline-block; width: 1em; margin-right: -2px;
  text-align: center; font-size: 11px; opacity: .3; }
.data th[aria-sort="ascending"] button::after { opacity: 1; color: var(--lamp); }
.data th[aria-sort="descending"] button::after { opacity: 1; color: var(--lamp); transform: scaleY(-1); }
.data thead th em { font-style: normal; font-weight: 450; margin-left: 4px; }
.data .num { text-align: right; white-space: nowrap; }
.data tbody th { font-weight: 550; }
.data tr.ours > * { background: var(--lamp-soft); }
.data tr.ours th { box-shadow: inset 3px 0 0 var(--lamp); font-weight: 680; }
.data tr.control th, .data tr.control td { color: var(--soft); }
.data td.best { font-weight: 700; color: var(--ink); }
.data tr.ours td.best { color: var(--lamp); }
.data td.mine { font-weight: 700; color: var(--lamp); }
.data td.none { color: var(--soft); opacity: .55; }
.badge { display: inline-block; margin-left: 8px; padding: 1px 8px; border-radius: 99px; font-size: 12px;
  line-height: 18px; font-weight: 550; color: var(--soft); border: 1px solid var(--line); background: var(--card);
  vertical-align: 1px; }
.data td .source { display: block; font-size: 12px; color: var(--soft); white-space: normal; }

.pictures { padding: 20px; }
table.pix { border-collapse: separate; border-spacing: 8px; margin: -8px; width: calc(100% + 16px);
  table-layout: fixed; }
.pix th { font-size: 13px; line-height: 1.3; font-weight: 500; color: var(--soft); padding: 0; }
.pix thead th { vertical-align: bottom; text-align: center; padding-bottom: 2px; overflow-wrap: anywhere;
  hyphens: auto; min-width: 84px; }
.pix tbody th { width: 104px; text-align: left; color: var(--ink); font-weight: 600; padding-right: 6px;
  overflow-wrap: anywhere; }
.pix .side { width: 104px; }
.pix td { padding: 0; min-width: 84px; }
.pix img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px;
  background: var(--faint); }
img.whole { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 8px; background: #fff; }
img.pixel { image-rendering: pixelated; }

.plot { padding: 20px 22px 14px; }
svg.chart { display: block; width: 100%; min-width: 620px; height: auto; font-family: var(--sans);
  font-variant-numeric: tabular-nums; overflow: visible; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.chart text { fill: var(--soft); } .chart .tick { font-size: 13px; } .chart .label { font-size: 13.5px; }
.plot details { margin-top: 10px; font-size: 14px; } .plot summary { cursor: pointer; color: var(--soft); }
.plot .numbers { margin-top: 12px; box-shadow: none; } .plot .numbers table { font-size: 14px; }
.c0 { --k: var(--k0); } .c1 { --k: var(--k1); } .c2 { --k: var(--k2); }
.c3 { --k: var(--k3); } .c4 { --k: var(--k4); } .c5 { --k: var(--k5); }
.curve path { fill: none; stroke: var(--k); stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.curve .dot { fill: var(--k); stroke: var(--card); stroke-width: 1.5; opacity: 0; }
.curve.few .dot, .mark:hover .dot { opacity: 1; }
.curve .hit { fill: transparent; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; list-style: none; margin: 0 0 14px; padding: 0;
  font-size: 14px; max-width: none; }
.legend li { display: flex; align-items: center; gap: 8px; }
.legend i { width: 18px; height: 3px; border-radius: 2px; background: var(--k); }

.bars { padding: 20px 22px; } .bars + .bars { border-top: 1px solid var(--line); }
.bar { display: grid; grid-template-columns: minmax(120px, 30%) 1fr 88px; align-items: center; gap: 14px;
  padding: 3px 0; font-size: 13px; }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-family: var(--mono); font-size: 12px; }
.bar svg { width: 100%; height: 12px; border-radius: 3px; display: block; }
.bar b { font-weight: 600; font-variant-numeric: tabular-nums; text-align: right; }
.bar b small { font-weight: 450; color: var(--soft); font-size: 12px; }
.bar.gone b { color: var(--bad); }
.track { fill: color-mix(in srgb, var(--k) 14%, var(--card)); } .fill { fill: var(--k); }

.highlights { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.highlight { padding: 16px 20px; } .highlight h3 { font-size: 15px; margin: 0 0 4px; }
.highlight p { font-size: 13px; color: var(--soft); margin: 0 0 10px; }
.highlight ol { list-style: none; margin: 0; padding: 0; font-family: var(--mono); font-size: 13px; line-height: 1.75;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.highlight mark { color: inherit; border-radius: 3px;
  background: color-mix(in srgb, var(--lamp) var(--on), transparent); }

.verdict { margin: 0 0 18px; padding-left: 14px; border-left: 3px solid var(--lamp); font-size: 17px;
  font-weight: 550; }
.claims { display: grid; gap: 16px; }
.claim { padding: 22px 24px 18px; }
.claim > p { font-size: 19px; line-height: 1.45; letter-spacing: -.01em; font-weight: 580; margin: 10px 0 16px; }
.claim .badge { margin: 0 6px 0 0; }
.claim .badge.strong { color: var(--lamp); background: var(--lamp-soft);
  border-color: color-mix(in srgb, var(--lamp) 35%, transparent); }
.claim .badge.open { border-style: dashed; border-color: var(--soft); }
.claim dl { display: grid; grid-template-columns: 132px 1fr; gap: 8px 18px; margin: 0; font-size: 15px; }
.claim dt { color: var(--soft); } .claim dd { margin: 0; }
.claim dd ul { margin: 0; padding-left: 1.1em; }
footer { border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
footer .wrap { padding-top: 20px; padding-bottom: 36px; }

@media (max-width: 680px) {
  .wrap { padding: 0 18px; } header .wrap { padding-top: 34px; padding-bottom: 76px; }
  section { margin-top: 40px; } .data th, .data td { padding: 10px 12px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tile b { font-size: 27px; }
  table.pix { table-layout: auto; width: auto; } .pix img { width: 96px; }
  .pix .side, .pix tbody th { width: 72px; }
  .claim dl { grid-template-columns: 1fr; gap: 2px; } .claim dd { margin-bottom: 10px; }
  .bar { grid-template-columns: 38% 1fr 64px; gap: 8px; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ddd; --faint: #f5f5f5; --shadow: none;
    --lamp: #c8331b; --lamp-soft: #fdeee9; --good: #17804f; --bad: #b3261e;
    --k0: #c8331b; --k1: #2163c4; --k2: #138a63; --k3: #a86a00; --k4: #7a45c2; --k5: #5b6472; }
  body { font-size: 11pt; } header .wrap { padding-top: 28px; padding-bottom: 70px; }
  section, .tile, .claim, figure, table.data tr { break-inside: avoid; } h2 { break-after: avoid; }
  .skip, .contents, .plot details:not([open]), .data thead button::after {
    display: none !important; }
  .scroll { overflow: visible; } svg.chart { min-width: 0; }
  .tile, .fill, .track, .legend i, tr.ours > * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  @page { margin: 14mm; }
}
"""
