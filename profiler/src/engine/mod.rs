//! What makes a target report hits.
