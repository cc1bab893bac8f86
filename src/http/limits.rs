//! Limits at the edge: who a request is counted for, and the headers that say where they stand.
//!
//! A request of somebody known is counted by [`Limit::admit`], as soon as a handler knows the caller.
//! Before that, and where nobody is known, the address is what there is to count by.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::app::App;
use crate::auth::Principal;
use crate::http::{Access, ApiError, names, route_table, set_header};
use crate::id::Wallet;
use crate::limits::{LimitError, Standing, client_address};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The other end of the connection, which may be a proxy.
#[derive(Copy, Clone)]
pub struct Peer(pub IpAddr);

/// What a handler asks the limits with, and where the answer is left for the headers.
#[derive(Clone)]
pub struct Limit {
    /// Where the request comes from.
    address: IpAddr,
    standing: Arc<Mutex<Option<Standing>>>,
}

impl FromRequestParts<App> for Limit {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(|| ApiError::unavailable(&"a request has no address"))
    }
}

impl Limit {
    /// Counts a request of a caller, against the limits of its wallet and of its key.
    pub fn admit(&self, app: &App, caller: &Principal) -> Result<(), ApiError> {
        let key = caller.api_key_id.zip(caller.key_limits.requests_per_minute);
        self.note(app.limits.request(caller.wallet, key))
    }

    fn admit_unknown(&self, app: &App) -> Result<(), ApiError> {
        self.note(app.limits.unauthenticated(self.address))
    }

    /// Whether a payment in the name of `payer` may be looked at.
    pub fn admit_payment(&self, app: &App, payer: Wallet) -> Result<(), ApiError> {
        Ok(app.limits.may_pay(self.address, payer)?)
    }

    /// Counts a payment that was refused.
    pub fn payment_refused(&self, app: &App, payer: Wallet) {
        app.limits.payment_failed(self.address, payer);
    }

    fn note(&self, answer: Result<Option<Standing>, LimitError>) -> Result<(), ApiError> {
        let standing = match &answer {
            Ok(standing) => *standing,
            Err(LimitError::Rate { standing, .. }) => Some(*standing),
            Err(_) => None,
        };
        if let Some(standing) = standing {
            *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = Some(standing);
        }
        answer.map(drop).map_err(ApiError::from)
    }

    fn standing(&self) -> Option<Standing> {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Around every request: counts what comes from nobody known, and tells in headers where the caller
/// stands.
pub async fn guard(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0);
    let address = client_address(peer, forwarded(request.headers()), &app.config.limits.trusted_proxies);
    let limit = Limit { address, standing: Arc::default() };
    request.extensions_mut().insert(limit.clone());
    let path = request.extensions().get::<MatchedPath>();
    let access = path.and_then(|path| ACCESS.get(path.as_str())).copied().unwrap_or(Access::Public);
    let proves = [AUTHORIZATION, names::X_API_KEY, names::SIGN_IN_WITH_X];
    // What an SDK sends that pays for each request proves nothing.
    let is_proof = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"Bearer x402");
    // A payment decides who calls, and whatever stands beside it proves nothing.
    let pays = [names::PAYMENT_SIGNATURE, names::X_PAYMENT];
    let is_paid = access == Access::Priced && pays.iter().any(|name| request.headers().contains_key(name));
    let has_proof = !is_paid && proves.iter().any(|name| request.headers().get(name).is_some_and(is_proof));
    let mut response = match access {
        Access::Public => return next.run(request).await,
        // A proof is found out to be wrong only by asking, and a right one must not suffer for it.
        Access::Priced | Access::Caller | Access::Owner | Access::Session if has_proof => {
            let response = next.run(request).await;
            match response.status() {
                StatusCode::UNAUTHORIZED => {
                    limit.admit_unknown(&app).map_or_else(|e| e.into_response(), |()| response)
                }
                _ => response,
            }
        }
        Access::Priced | Access::Caller | Access::Owner | Access::Session | Access::Siwe | Access::X402 => {
            match limit.admit_unknown(&app) {
                Ok(()) => next.run(request).await,
                Err(error) => error.into_response(),
            }
        }
    };
    if let Some(standing) = limit.standing() {
        let resets_at = standing.resets_at.millis().saturating_add(999).div_euclid(1000);
        set_header(&mut response, names::X_RATELIMIT_LIMIT, &standing.limit.to_string());
        set_header(&mut response, names::X_RATELIMIT_REMAINING, &standing.remaining.to_string());
        set_header(&mut response, names::X_RATELIMIT_RESET, &resets_at.to_string());
    }
    response
}

/// The routes' access by their paths; all methods of a path ask alike.
static ACCESS: LazyLock<HashMap<&'static str, Access>> =
    LazyLock::new(|| route_table().into_iter().map(|(_, path, access)| (path, access)).collect());

/// What `X-Forwarded-For` says, however many headers it comes in, left to right.
fn forwarded(headers: &HeaderMap) -> impl DoubleEndedIterator<Item = &str> {
    let lines = headers.get_all(X_FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or_default());
    lines.flat_map(|line| line.split(','))
}
