//! The view on a terminal: drawn for each sample, each key and each new size.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use control::Code;
use control::client::Failure;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};
use serde_json::Value;

use super::super::print;
use super::{Sample, Source, Stop, view};

/// How often it is looked for keys while the daemon is asked.
const KEYS: Duration = Duration::from_millis(100);

/// Shows a view for each interval until `q`, Escape or Ctrl-C.
pub fn run(path: &Path, interval: Duration) -> Result<(), Stop> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "`top` draws on a terminal, and this is none; give --json for lines of JSON";
        return Err(Failure::new(Code::OutputFailed, message).into());
    }
    let mut source = Source::new(path);
    // Without a daemon nothing is drawn.
    let first = source.sample()?;
    let mut terminal = ratatui::try_init()?;
    let shown = show(&mut terminal, &mut source, first, interval);
    ratatui::try_restore()?;
    Ok(shown?)
}

fn show(
    terminal: &mut DefaultTerminal,
    source: &mut Source<'_>,
    first: Sample,
    interval: Duration,
) -> io::Result<()> {
    let mut before = first;
    let mut shown = view(&before, &before);
    let mut failure = None;
    let mut next = Instant::now() + interval.min(KEYS);
    loop {
        terminal.draw(|frame| draw(frame, &shown, failure.as_ref()))?;
        let left = next.saturating_duration_since(Instant::now());
        if event::poll(left)? {
            if is_end(&event::read()?) {
                return Ok(());
            }
            // It may be a new size.
            continue;
        }
        match source.sample() {
            Ok(now) => {
                shown = view(&before, &now);
                (before, failure) = (now, None);
            }
            Err(why) => failure = Some(why),
        }
        next = Instant::now() + interval;
    }
}

fn is_end(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let is_interrupt =
        key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

fn draw(frame: &mut Frame<'_>, view: &Value, failure: Option<&Failure>) {
    let operations = operations(view);
    let queues = queues(view);
    let heights = [
        Constraint::Length(4),
        Constraint::Length(operations.len() as u16 + 2),
        Constraint::Length(queues.len() as u16 + 2),
        Constraint::Min(2),
        Constraint::Length(1),
    ];
    let [head, at_operations, at_queues, changes, foot] =
        Layout::vertical(heights).areas(frame.area());
    frame.render_widget(Paragraph::new(Text::from(header(view))), head);
    let columns =
        ["operation", "requests/s", "MiB/s", "errors/s", "mean us", "50 %", "99 %", "max"];
    frame.render_widget(table(&columns, operations), at_operations);
    let columns = ["queue", "in flight", "oldest us", "requests/s", "errors/s", "parks"];
    frame.render_widget(table(&columns, queues), at_queues);
    frame.render_widget(Paragraph::new(Text::from(last_changes(view))), changes);
    let line = match failure {
        Some(failure) => print::clean(&failure.message),
        None => "q: quit".to_owned(),
    };
    frame.render_widget(Line::from(line), foot);
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn table<'a>(columns: &[&'a str], rows: Vec<Vec<String>>) -> Table<'a> {
    let widths = columns.iter().map(|name| Constraint::Length(name.len().max(12) as u16));
    Table::new(rows.into_iter().map(Row::new), widths)
        .header(Row::new(columns.iter().copied()).style(bold()))
}

fn header(view: &Value) -> Vec<Line<'static>> {
    let domain = &view["domain"];
    let text = |value: &Value| print::shown(value);
    let pid = |part: &str| text(&view[part]["pid"]);
    let fault = view["fault"].as_str().map(|why| format!(": {}", print::clean(why)));
    vec![
        Line::styled(
            format!(
                "{}{}  generation {}  {}  standby {}",
                text(&view["state"]),
                fault.unwrap_or_default(),
                text(&view["generation"]),
                print::domain(domain),
                text(&view["standby"]),
            ),
            bold(),
        ),
        Line::from(format!(
            "frontend {}  {} bytes  resident modules {}",
            if view["connected"] == true { "connected" } else { "not connected" },
            text(&view["capacity"]),
            view["resident_modules"].as_array().map_or(0, Vec::len),
        )),
        Line::from(format!(
            "supervisor {}  server {}  deaths {}  recoveries {}",
            pid("supervisor"),
            pid("server"),
            text(&view["server"]["deaths"]),
            text(&view["server"]["recoveries"]),
        )),
    ]
}

fn operations(view: &Value) -> Vec<Vec<String>> {
    let Some(operations) = view["operations"].as_object() else {
        return vec![vec!["(no --metrics)".to_owned()]];
    };
    let row = |(name, of): (&String, &Value)| {
        let latency = &of["latency_us"];
        let mib = of["bytes_per_s"].as_f64().map(|bytes| format!("{:.1}", bytes / 1_048_576.0));
        let mut row = vec![print::clean(name), print::shown(&of["requests_per_s"])];
        row.push(mib.unwrap_or_default());
        row.push(print::shown(&of["errors_per_s"]));
        row.extend(["mean", "p50", "p99", "max"].map(|member| print::shown(&latency[member])));
        row
    };
    operations.iter().map(row).collect()
}

fn queues(view: &Value) -> Vec<Vec<String>> {
    let members =
        ["index", "in_flight", "oldest_age_us", "requests_per_s", "errors_per_s", "parks"];
    let row = |queue: &Value| members.map(|member| print::shown(&queue[member])).to_vec();
    view["queues"].as_array().into_iter().flatten().map(row).collect()
}

/// The newest first, each with its phases below it.
fn last_changes(view: &Value) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled("last changes", bold())];
    for change in view["last_changes"].as_array().into_iter().flatten().rev() {
        lines.push(Line::from(print::event(change)));
        lines.extend(print::phases(change).map(Line::from));
    }
    lines
}
