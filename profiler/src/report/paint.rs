//! ANSI colors, where the caller wants them.

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

impl Paint {
    pub fn paint(self, tint: Tint, text: &str) -> String {
        let code = match tint {
            Tint::Bold => "1",
            Tint::Dim => "2",
            Tint::Red => "31",
            Tint::Yellow => "33",
            Tint::Green => "32",
            Tint::Plain => return text.to_owned(),
        };
        if self.0 && !text.trim().is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
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
