//! Serving a listener until told to stop.

use std::future::Future;
use std::io;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use crate::app::app;
use crate::state::AppState;

/// Serves until `shutdown` is ready, then takes no new connection or request, lets running requests finish, and
/// returns. The engine is shut down with it: what a pause holds would never finish.
///
/// # Errors
/// What the listener reports.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // A streamed token must not wait for the next one; without the option it is only slower.
        let _ = connection.set_nodelay(true);
    });
    let engine = state.engine().clone();
    let shutdown = async move {
        shutdown.await;
        engine.shutdown();
    };
    axum::serve(listener, app(state)).with_graceful_shutdown(shutdown).await
}
