//! The data model of a profile: what is saved and what every report reads.
