//! What the demo prints: short lines with the time before them, for a terminal of 80 columns.
//!
//! Colours are for people only: none if standard output is no terminal, or `NO_COLOR` is set.

use std::io::IsTerminal;
use std::time::Instant;

/// Columns of a line, the time included.
const WIDTH: usize = 80;
/// Columns of the time and the space after it.
const MARGIN: usize = 9;

/// The terminal, and when the demo began.
pub struct Screen {
    began: Instant,
    coloured: bool,
}

/// What a line is about.
#[derive(Clone, Copy)]
pub enum Tone {
    /// What is done.
    Plain,
    /// What went well.
    Good,
    /// What was refused, as it should be.
    Odd,
    /// What must not be.
    Bad,
}

impl Tone {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "0",
            Self::Good => "32",
            Self::Odd => "33",
            Self::Bad => "1;31",
        }
    }
}

impl Screen {
    pub fn new() -> Self {
        let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { began: Instant::now(), coloured }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.coloured { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A heading.
    pub fn heading(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }

    /// A line of the story, with the time; wrapped if it is long.
    pub fn say(&self, text: &str) {
        self.tell(Tone::Plain, text);
    }

    /// Like [`say`](Self::say), in a tone.
    pub fn tell(&self, tone: Tone, text: &str) {
        let time = format!("{:>6.1} s", self.began.elapsed().as_secs_f64());
        for (index, line) in wrap(text, WIDTH - MARGIN - 1).iter().enumerate() {
            let margin = if index == 0 { self.paint("2", &time) } else { " ".repeat(time.len()) };
            println!("{margin}  {}", self.paint(tone.code(), line));
        }
    }

    /// A command as an operator would type it.
    pub fn command(&self, text: &str) {
        println!("{}{}", " ".repeat(MARGIN + 1), self.paint("36", &format!("$ {text}")));
    }

    /// Something that is found, without the time.
    pub fn row(&self, tone: Tone, text: &str) {
        println!("  {}", self.paint(tone.code(), text));
    }

    /// Words in as many rows as they need.
    pub fn paragraph(&self, text: &str) {
        for line in wrap(text, WIDTH - 4) {
            println!("    {line}");
        }
    }
}

/// Breaks at spaces; a word that is too long has a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut words = text.split(' ');
    let mut lines = vec![words.next().unwrap_or("").to_owned()];
    for word in words {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// 12345678 as `12 345 678`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}
