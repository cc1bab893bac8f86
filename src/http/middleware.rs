//! What happens around every request: its id, one line in the log, counters, CORS, cache headers.

use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, EXPECT, REFERRER_POLICY, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::app::App;
use crate::formats::conversation::ClientFormat;
use crate::http::extract::{self, RequestId};
use crate::http::leftover::Leftover;
use crate::http::{conversation, error, limits, names, route_table};
use crate::telemetry;

/// How long a browser may remember a preflight's answer.
const PREFLIGHT_SECONDS: u64 = 7200;

const METHODS: [Method; 4] = [Method::GET, Method::POST, Method::DELETE, Method::PATCH];

/// The paths of the routes, which last as long as the program: what is counted by them need not copy them.
static ROUTES: LazyLock<HashSet<&'static str>> =
    LazyLock::new(|| route_table().into_iter().map(|(_, path, _)| path).collect());

/// Any word is a method; only those we serve are worth a series of their own.
fn served(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// What a browser's script may read of every answer.
const EXPOSED: [HeaderName; 12] = [
    names::PAYMENT_REQUIRED,
    names::PAYMENT_RESPONSE,
    names::X_PAYMENT_RESPONSE,
    RETRY_AFTER,
    names::X_SHOULD_RETRY,
    names::IDEMPOTENT_REPLAYED,
    names::X_REQUEST_ID,
    names::X_CHARGED_USDC,
    names::X_BALANCE_USDC,
    names::X_RATELIMIT_LIMIT,
    names::X_RATELIMIT_REMAINING,
    names::X_RATELIMIT_RESET,
];

pub fn wrap(router: Router<App>, app: &App) -> Router<App> {
    router
        .layer(from_fn_with_state(app.clone(), limits::guard))
        .layer(from_fn_with_state(app.clone(), around))
        .layer(cors(&app.config.cors_origins))
}

fn cors(origins: &[String]) -> CorsLayer {
    let origin = if origins.is_empty() {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods(AllowMethods::list(METHODS))
        // SDKs send many of their own; what they may send is what they ask to.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
        .max_age(Duration::from_secs(PREFLIGHT_SECONDS))
}

async fn around(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = app.entropy.request_id(app.clock.now().millis());
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().and_then(|path| ROUTES.get(path.as_str()).copied());
    let route = route.unwrap_or("unknown");
    // Only a signed message in the query makes a URL a secret.
    let signed_url = request.uri().query().is_some() && extract::is_signed(request.uri());

    let leftover = Leftover::new(std::mem::take(request.body_mut()));
    *request.body_mut() = Body::new(leftover.clone());
    // Who waits for leave to send a body has sent none.
    let awaits_leave = request.headers().contains_key(EXPECT);

    let mut response = next.run(request).await;
    let speaks_messages = conversation::speaks_messages(route);
    if speaks_messages {
        response = error::retold(response, ClientFormat::Messages, &id);
    }
    if response.status().as_u16() >= 400 && !awaits_leave {
        leftover.discard().await;
    }

    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        if speaks_messages {
            headers.insert(names::REQUEST_ID, id.clone());
        }
        headers.insert(names::X_REQUEST_ID, id);
    }
    if signed_url {
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
    let status = response.status();
    if signed_url || status == StatusCode::PAYMENT_REQUIRED {
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    let elapsed = started.elapsed();
    telemetry::count_request(served(&method), route, status.as_u16(), elapsed);
    // The route and not the path: paths hold wallets, queries hold signatures.
    tracing::info!(
        request = %id, %method, route, status = status.as_u16(),
        ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX), "request"
    );
    response
}

/// Serves the Prometheus text format, on a listener of its own.
pub fn metrics_router(handle: PrometheusHandle) -> Router {
    Router::new().route("/metrics", get(move || std::future::ready(handle.render())))
}
