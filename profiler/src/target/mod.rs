//! The process that is watched: finding it, opening what it runs, starting it, seeing it end.

mod child;
mod error;
mod executable;
mod modules;
mod process;
mod wait;

pub use child::PausedChild;
pub use error::TargetError;
pub use executable::Executable;
pub use modules::GoModule;
pub use process::{Process, stopped};
pub use wait::{Signals, Wake, wait};
