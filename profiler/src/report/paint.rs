//! ANSI colors, where the caller wants them.

use std::fmt;

use deferprof_symbols::Mechanism;

/// Whether text is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Paint(pub bool);

/// How a piece of text looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Tint {
    #[default]
    Plain,
    Bold,
    Dim,
    Red,
    Yellow,
    Green,
}

/// Text that is written in its colour.
#[derive(Clone, Copy, Debug)]
pub(super) struct Painted<'a> {
    /// Of the escape sequence; `None` for none.
    code: Option<&'static str>,
    text: &'a str,
}

impl Paint {
    pub fn paint(self, tint: Tint, text: &str) -> Painted<'_> {
        let code = match tint {
            Tint::Plain => None,
            Tint::Bold => Some("1"),
            Tint::Dim => Some("2"),
            Tint::Red => Some("31"),
            Tint::Yellow => Some("33"),
            Tint::Green => Some("32"),
        };
        Painted {
            code: code.filter(|_| self.0 && !text.trim().is_empty()),
            text,
        }
    }
}

impl Painted<'_> {
    pub fn push_to(self, line: &mut String) {
        let Some(code) = self.code else {
            return line.push_str(self.text);
        };
        for part in ["\x1b[", code, "m", self.text, "\x1b[0m"] {
            line.push_str(part);
        }
    }
}

impl fmt::Display for Painted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.push_to(&mut text);
        f.write_str(&text)
    }
}

impl From<Mechanism> for Tint {
    /// Dear ones are red, cheap ones green.
    fn from(mechanism: Mechanism) -> Self {
        match mechanism {
            Mechanism::Heap | Mechanism::RangeFunc => Self::Red,
            Mechanism::Stack => Self::Yellow,
            Mechanism::OpenCoded => Self::Green,
        }
    }
}
