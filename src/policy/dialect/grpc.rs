//! gRPC status codes (F38).

use std::fmt::Write;

use http::StatusCode;

use super::ErrorClass;

/// The gRPC status that says what an HTTP status says, for answers evergate makes itself. (Not the
/// table of gRPC's http-grpc-status-mapping.md, which is for clients that met a bare HTTP status.)
pub fn grpc_status(status: StatusCode) -> u32 {
    match status.as_u16() {
        200..=299 => 0,
        401 => 16,
        403 => 7,
        404 => 5,
        408 | 504 => 4,
        413 | 429 => 8,
        499 => 1,
        400..=499 => 3,
        501 => 12,
        502 | 503 => 14,
        _ => 13,
    }
}

/// What a backend's `grpc-status` says; `None` for OK.
pub fn grpc_class(status: u32) -> Option<ErrorClass> {
    match status {
        0 => None,
        // CANCELLED, and what the request got wrong: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS,
        // PERMISSION_DENIED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
        1 => Some(ErrorClass::ClientFault(499)),
        3 | 9 | 11 => Some(ErrorClass::ClientFault(400)),
        5 => Some(ErrorClass::ClientFault(404)),
        6 | 10 => Some(ErrorClass::ClientFault(409)),
        7 => Some(ErrorClass::ClientFault(403)),
        12 => Some(ErrorClass::ClientFault(501)),
        16 => Some(ErrorClass::ClientFault(401)),
        // RESOURCE_EXHAUSTED
        8 => Some(ErrorClass::Overloaded),
        // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS and codes from the future.
        _ => Some(ErrorClass::ServerFault),
    }
}

/// A message as the value of `grpc-message`: percent-encoded (gRPC over HTTP/2, "Status-Message").
pub fn grpc_message(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for &byte in message.as_bytes() {
        if (0x20..0x7F).contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_judged_as_the_catalogue_says() {
        assert_eq!(grpc_class(0), None);
        assert_eq!(grpc_class(3), Some(ErrorClass::ClientFault(400)));
        assert_eq!(grpc_class(8), Some(ErrorClass::Overloaded));
        assert_eq!(grpc_class(13), Some(ErrorClass::ServerFault));
        assert_eq!(grpc_class(14), Some(ErrorClass::ServerFault));
        for (codes, class) in [
            (&[3, 9, 11][..], ErrorClass::ClientFault(400)),
            (&[1], ErrorClass::ClientFault(499)),
            (&[5], ErrorClass::ClientFault(404)),
            (&[6, 10], ErrorClass::ClientFault(409)),
            (&[7], ErrorClass::ClientFault(403)),
            (&[12], ErrorClass::ClientFault(501)),
            (&[16], ErrorClass::ClientFault(401)),
            (&[2, 4, 13, 14, 15, 99], ErrorClass::ServerFault),
        ] {
            for &code in codes {
                assert_eq!(grpc_class(code), Some(class), "{code}");
            }
        }
    }

    #[test]
    fn what_evergate_refuses_has_the_code_for_it() {
        // Names as in gRPC's own list of codes.
        let [ok, cancelled, invalid_argument, deadline_exceeded] = [0, 1, 3, 4];
        let [not_found, permission_denied, resource_exhausted, unimplemented] = [5, 7, 8, 12];
        let [internal, unavailable, unauthenticated] = [13, 14, 16];
        for (status, code) in [
            (200, ok),
            (400, invalid_argument),
            (401, unauthenticated),
            (403, permission_denied),
            (404, not_found),
            (408, deadline_exceeded),
            (413, resource_exhausted),
            (415, invalid_argument),
            (429, resource_exhausted),
            (499, cancelled),
            (500, internal),
            (501, unimplemented),
            (502, unavailable),
            (503, unavailable),
            (504, deadline_exceeded),
        ] {
            assert_eq!(grpc_status(StatusCode::from_u16(status).unwrap()), code, "{status}");
        }
    }

    #[test]
    fn a_message_is_a_header_value() {
        assert_eq!(grpc_message("100% gone\n\u{e9}"), "100%25 gone%0A%C3%A9");
    }
}
