//! Pictures as SVG text: ratios in rows, and latencies over time. Both axes of numbers are
//! logarithmic.
//!
//! Colours go with light and dark backgrounds alike; text takes the page's own colour.

use std::collections::BTreeSet;
use std::fmt::Write;

/// One colour per series.
const COLOURS: [&str; 5] = ["#2f7ed8", "#e8743b", "#2aa198", "#b54fc5", "#8a8a8a"];

const STYLE: &str = "<style>text{font:12px sans-serif;fill:#808080}.title{font-size:15px;font-weight:bold}\
.grid{stroke:#808080;stroke-opacity:.25}.one{stroke:#808080;stroke-width:1.5}</style>";

/// A ratio with its spread.
pub(super) struct Bar {
    /// Index into the names of the series.
    pub series: usize,
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// Rows of ratios on one logarithmic axis, with a line at 1.
pub(super) fn ratios(
    title: &str,
    axis: &str,
    series: &[String],
    rows: &[(String, Vec<Bar>)],
) -> String {
    const LEFT: f64 = 330.0;
    const WIDTH: f64 = 520.0;
    const ROW: f64 = 20.0;
    let all = || rows.iter().flat_map(|(_, bars)| bars);
    let low = all().map(|bar| bar.min).filter(|&v| v > 0.0).fold(0.5, f64::min).log2().floor();
    let high = all().map(|bar| bar.max).fold(2.0, f64::max).log2().ceil();
    let x = |ratio: f64| LEFT + (ratio.max(1e-9).log2() - low) / (high - low) * WIDTH;
    let top = 66.0;
    let bottom = top + ROW * rows.len() as f64;
    let mut out = open(LEFT + WIDTH + 40.0, bottom + 44.0, title);
    legend(&mut out, series, 44.0);
    for power in low as i32..=high as i32 {
        let ratio = 2f64.powi(power);
        let class = if power == 0 { "one" } else { "grid" };
        let at = x(ratio);
        let _ = write!(
            out,
            "<path class='{class}' d='M{at:.1} {top}V{bottom}'/>\
             <text x='{at:.1}' y='{}' text-anchor='middle'>{ratio}</text>",
            bottom + 16.0
        );
    }
    let _ = write!(
        out,
        "<text x='{}' y='{}' text-anchor='middle'>{}</text>",
        LEFT + WIDTH / 2.0,
        bottom + 34.0,
        escape(axis)
    );
    for (index, (name, bars)) in rows.iter().enumerate() {
        let y = top + ROW * (index as f64 + 0.5);
        let _ = write!(
            out,
            "<text x='{}' y='{:.1}' text-anchor='end'>{}</text>",
            LEFT - 10.0,
            y + 4.0,
            escape(name)
        );
        for bar in bars {
            let colour = COLOURS[bar.series % COLOURS.len()];
            let y = y + (bar.series as f64 - (series.len() as f64 - 1.0) / 2.0) * 5.0;
            let _ = write!(
                out,
                "<path stroke='{colour}' stroke-width='2' d='M{:.1} {y:.1}H{:.1}'/>\
                 <circle cx='{:.1}' cy='{y:.1}' r='3.5' fill='{colour}'/>",
                x(bar.min),
                x(bar.max),
                x(bar.median)
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Latencies of single requests, by when they ended.
pub(super) struct Cloud {
    pub name: String,
    /// Milliseconds from the event, latency in nanoseconds.
    pub points: Vec<(f64, f64)>,
}

/// A panel per cloud, above each other with common axes: time in milliseconds from the event, and
/// latency.
pub(super) fn latencies(title: &str, from_ms: f64, to_ms: f64, clouds: &[Cloud]) -> String {
    const LEFT: f64 = 70.0;
    const WIDTH: f64 = 880.0;
    const PANEL: f64 = 150.0;
    let all = || clouds.iter().flat_map(|cloud| &cloud.points).map(|&(_, ns)| ns.max(1.0));
    let low = all().fold(1e4, f64::min).log10().floor();
    let high = all().fold(1e6, f64::max).log10().ceil();
    let x = |ms: f64| LEFT + (ms - from_ms) / (to_ms - from_ms) * WIDTH;
    let height = 50.0 + clouds.len() as f64 * (PANEL + 44.0);
    let mut out = open(LEFT + WIDTH + 30.0, height + 10.0, title);
    for (index, cloud) in clouds.iter().enumerate() {
        let top = 62.0 + index as f64 * (PANEL + 44.0);
        let y = |ns: f64| top + PANEL - (ns.max(1.0).log10() - low) / (high - low) * PANEL;
        let _ = write!(out, "<text x='{LEFT}' y='{}'>{}</text>", top - 6.0, escape(&cloud.name));
        for power in low as i32..=high as i32 {
            let at = y(10f64.powi(power));
            let _ = write!(
                out,
                "<path class='grid' d='M{LEFT} {at:.1}h{WIDTH}'/><text x='{}' y='{:.1}' text-anchor='end'>{}</text>",
                LEFT - 6.0,
                at + 4.0,
                decade(power)
            );
        }
        let bottom = top + PANEL;
        let step = ((to_ms - from_ms) / 8.0).max(1.0);
        let step =
            10f64.powf(step.log10().floor()) * if step.log10().fract() > 0.5 { 5.0 } else { 2.0 };
        let mut tick = (from_ms / step).ceil() * step;
        while tick <= to_ms {
            let class = if tick == 0.0 { "one" } else { "grid" };
            let at = x(tick);
            let _ = write!(
                out,
                "<path class='{class}' d='M{at:.1} {top}v{PANEL}'/>\
                 <text x='{at:.1}' y='{:.1}' text-anchor='middle'>{tick} ms</text>",
                bottom + 15.0
            );
            tick += step;
        }
        // As many points as can be told apart.
        let places: BTreeSet<(i64, i64)> = cloud
            .points
            .iter()
            .filter(|(ms, _)| (from_ms..=to_ms).contains(ms))
            .map(|&(ms, ns)| (x(ms).round() as i64, y(ns).round() as i64))
            .collect();
        let colour = COLOURS[index % COLOURS.len()];
        let _ = write!(out, "<path stroke='{colour}' stroke-width='2' d='");
        for (x, y) in places {
            let _ = write!(out, "M{} {y}h2", x - 1);
        }
        out.push_str("'/>");
        // The slowest can be one request among a million: it would not be seen.
        let slowest = cloud.points.iter().filter(|(ms, _)| (from_ms..=to_ms).contains(ms));
        if let Some(&(ms, ns)) = slowest.max_by(|a, b| a.1.total_cmp(&b.1)) {
            let anchor = if x(ms) > LEFT + WIDTH * 0.8 { "end" } else { "start" };
            let _ = write!(
                out,
                "<circle cx='{:.1}' cy='{:.1}' r='4' fill='none' stroke='{colour}' stroke-width='1.5'/>\
                 <text x='{:.1}' y='{:.1}' text-anchor='{anchor}'>slowest: {}</text>",
                x(ms),
                y(ns),
                x(ms) + if anchor == "end" { -9.0 } else { 9.0 },
                y(ns) + 4.0,
                super::stats::time(ns)
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

fn open(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>\
         {STYLE}<text class='title' x='16' y='24'>{}</text>",
        escape(title)
    )
}

fn legend(out: &mut String, series: &[String], y: f64) {
    let mut x = 16.0;
    for (index, name) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let _ = write!(
            out,
            "<circle cx='{}' cy='{}' r='4' fill='{colour}'/><text x='{}' y='{y}'>{}</text>",
            x + 4.0,
            y - 4.0,
            x + 14.0,
            escape(name)
        );
        x += 34.0 + 6.6 * name.len() as f64;
    }
}

fn decade(power: i32) -> String {
    super::stats::time(10f64.powi(power)).replace(".00", "").replace(".0", "")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_balanced_and_escaped() {
        let bars = vec![Bar { series: 0, median: 1.5, min: 1.0, max: 3.0 }];
        let picture =
            ratios("a < b", "ratio", &["x".to_owned()], &[("row & more".to_owned(), bars)]);
        assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("a &lt; b") && picture.contains("row &amp; more"));
        let cloud =
            Cloud { name: "c".to_owned(), points: vec![(-1.0, 5e4), (2.0, 1e9), (500.0, 1.0)] };
        let picture = latencies("t", -10.0, 100.0, &[cloud]);
        assert!(picture.contains("slowest: 1.00 s"), "{picture}");
        assert!(!picture.contains("NaN"));
    }
}
