//! What is said on standard error while a recording runs.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// A line on standard error that is written again and again, if that is a terminal.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    verbose: bool,
    shown: bool,
    last: (Instant, u64),
}

impl Progress {
    /// Nothing shown yet.
    pub fn new(verbose: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        Self {
            terminal,
            verbose,
            shown: false,
            last: (Instant::now(), 0),
        }
    }

    /// Whether there is anybody to watch the line.
    pub fn is_live(&self) -> bool {
        self.terminal
    }

    /// Shows how far the recording is.
    pub fn update(&mut self, elapsed: Duration, limit: Option<Duration>, registered: u64) {
        if !self.terminal {
            return;
        }
        let (then, before) = std::mem::replace(&mut self.last, (Instant::now(), registered));
        let seconds = then.elapsed().as_secs_f64();
        let rate = if seconds > 0.0 {
            registered.saturating_sub(before) as f64 / seconds
        } else {
            0.0
        };
        let of = limit.map_or_else(String::new, |l| format!(" of {:.1} s", l.as_secs_f64()));
        let line = format!(
            "deferprof: {:.1} s{of}   {registered} defers   {rate:.0}/s   (Ctrl-C stops)",
            elapsed.as_secs_f64()
        );
        // Erases what a longer line before has left.
        write!(io::stderr(), "\r{line}\x1b[K").ok();
        self.shown = true;
    }

    /// Ends the line.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            write!(io::stderr(), "\r\x1b[K").ok();
        }
    }

    /// A sentence for those who asked for them.
    pub fn detail(&mut self, sentence: &str) {
        if self.verbose {
            self.say(sentence);
        }
    }

    /// A sentence for everybody.
    pub fn say(&mut self, sentence: &str) {
        self.clear();
        writeln!(io::stderr(), "deferprof: {sentence}").ok();
    }
}
