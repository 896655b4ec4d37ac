//! stub
pub mod advantage;
pub mod loss;
pub mod minibatch;
pub mod optim;
