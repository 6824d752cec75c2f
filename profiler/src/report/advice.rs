//! Why a site is not open-coded, and what to do about it: a sentence for each reason.

use deferprof_symbols::Reason;

use crate::profile::WhyNotOpenCoded;

/// The explanation under a table, or `None` for a word that this version does not know.
pub(super) fn sentence(reason: &WhyNotOpenCoded) -> Option<&'static str> {
    let WhyNotOpenCoded::Rule(reason) = reason else {
        return None;
    };
    Some(match reason {
        Reason::Loop => {
            "the statement stands in a loop, so every turn takes a record; \
             move the loop's body into a function of its own"
        }
        Reason::LoopInFunction => {
            "another defer of the function stands in a loop, which bars open coding for all of them; \
             move that loop's body into a function of its own"
        }
        Reason::Over8Defers => "the function has more than 8 defers; split it",
        Reason::ReturnsTimesDefers => {
            "the function's returns times its defers exceed 15; join returns or split it"
        }
        Reason::OptimizationsOff => "the package was compiled with -N; build it without",
        Reason::Race => "the race detector turns open coding off; build without -race",
        Reason::ResultsEscape => {
            "a result of the function lives on the heap, because its address is taken; \
             return a copy instead"
        }
        Reason::RangeFunc => {
            "the statement stands in the body of a range-over-func loop, \
             so every turn takes a record; move the body into a function of its own"
        }
        Reason::RangeFuncInFunction => {
            "another defer of the function stands in a range-over-func body; \
             move that body into a function of its own"
        }
        Reason::OldRelease => "Go 1.13 and older know no open coding; build with a newer release",
        _ => return None,
    })
}
