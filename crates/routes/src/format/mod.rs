//! The encodings of rows that clients know.

mod npy;
mod object;

pub use npy::npy_base64;
pub use object::ObjectRows;
