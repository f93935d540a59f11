//! Which API path is asked for, and which words are spoken there.
//!
//! Paths are matched exactly: engines do, and a path that only resembles an inference path must not
//! gain its licence to be sent twice.

use http::Method;

use super::event::Shape;

/// The family of wire shapes, which decides how errors are worded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// OpenAI's API and the engines that follow it: `{"error":{…}}`, SSE ending in `[DONE]`.
    OpenAi,
    /// Anthropic's messages: `{"type":"error",…}`, named SSE events.
    Anthropic,
    /// KServe v2 / Triton: `{"error":"…"}`.
    Kserve,
    /// Ollama's own API: `{"error":"…"}`, JSON lines.
    Ollama,
    /// llama.cpp's own `/completion`: OpenAI-like errors with a numeric code, SSE without `[DONE]`.
    LlamaCpp,
    /// TGI's own `/generate` (SGLang has one too): `{"error":"…","error_type":"…"}`.
    Tgi,
    /// gRPC: a status in the trailers.
    Grpc,
    /// Anything else: plain text.
    Plain,
}

/// An API path, as far as evergate tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/embeddings`, `/embed`, `/pooling`, …: vectors of numbers
    Embeddings,
    /// `/v1/rerank`, `/rerank`, …
    Rerank,
    /// `/v1/score`, `/score`
    Score,
    /// `/classify`, `/predict`
    Classify,
    /// `/v1/moderations`
    Moderations,
    /// `/tokenize` and its like
    Tokenize,
    /// `/detokenize`
    Detokenize,
    /// `/v1/messages`
    AnthropicMessages,
    /// `/v1/messages/count_tokens`
    CountTokens,
    /// `/api/chat`
    OllamaChat,
    /// `/api/generate`
    OllamaGenerate,
    /// `/api/embed`, `/api/embeddings`
    OllamaEmbed,
    /// llama.cpp's `/completion`
    LlamaCompletion,
    /// llama.cpp's `/infill`
    Infill,
    /// `/generate` of TGI, SGLang and LMDeploy
    Generate,
    /// `/generate_stream` of TGI: always a stream
    GenerateStream,
    /// `/v2/models/{m}/infer` (also KServe v1 `/v1/models/{m}:predict`)
    KserveInfer,
    /// `/v2/models/{m}/generate`
    KserveGenerate,
    /// `/v2/models/{m}/generate_stream`: always a stream
    KserveGenerateStream,
    /// `/inference.GRPCInferenceService/ModelInfer`
    GrpcInfer,
    /// `GET /v1/models` and one of its entries
    Models,
    /// Everything else: passed on, not interpreted
    Other,
}

/// What follows an optional `/v1`, for the paths that engines accept in both forms.
const POSTS: &[(&str, Endpoint)] = &[
    ("/chat/completions", Endpoint::ChatCompletions),
    ("/completions", Endpoint::Completions),
    ("/responses", Endpoint::Responses),
    ("/embeddings", Endpoint::Embeddings),
    ("/embedding", Endpoint::Embeddings),
    ("/pooling", Endpoint::Embeddings),
    ("/rerank", Endpoint::Rerank),
    ("/reranking", Endpoint::Rerank),
    ("/score", Endpoint::Score),
    ("/classify", Endpoint::Classify),
    ("/moderations", Endpoint::Moderations),
    ("/tokenize", Endpoint::Tokenize),
    ("/detokenize", Endpoint::Detokenize),
    ("/messages", Endpoint::AnthropicMessages),
    ("/messages/count_tokens", Endpoint::CountTokens),
];

/// Paths of one engine, matched whole.
const NATIVE_POSTS: &[(&str, Endpoint)] = &[
    ("/generate", Endpoint::Generate),
    ("/generate_stream", Endpoint::GenerateStream),
    ("/completion", Endpoint::LlamaCompletion),
    ("/infill", Endpoint::Infill),
    ("/api/chat", Endpoint::OllamaChat),
    ("/api/generate", Endpoint::OllamaGenerate),
    ("/api/embed", Endpoint::OllamaEmbed),
    ("/api/embeddings", Endpoint::OllamaEmbed),
    ("/v2/rerank", Endpoint::Rerank),
    // text-embeddings-inference
    ("/embed", Endpoint::Embeddings),
    ("/embed_all", Endpoint::Embeddings),
    ("/embed_sparse", Endpoint::Embeddings),
    ("/similarity", Endpoint::Score),
    ("/predict", Endpoint::Classify),
    // TGI, llama.cpp
    ("/chat_tokenize", Endpoint::Tokenize),
    ("/apply-template", Endpoint::Tokenize),
    ("/inference.GRPCInferenceService/ModelInfer", Endpoint::GrpcInfer),
];

impl Endpoint {
    /// The endpoint of a request; `path` without query. Never fails: what is not known is
    /// [`Other`](Self::Other).
    pub fn of(method: &Method, path: &str) -> Self {
        if method == Method::GET {
            let models = path.strip_prefix("/v1/models").or_else(|| path.strip_prefix("/models"));
            return match models {
                Some("") => Self::Models,
                Some(one) if one.starts_with('/') => Self::Models,
                _ => Self::Other,
            };
        }
        if method != Method::POST {
            return Self::Other;
        }
        let find = |table: &[(&str, Self)], path: &str| {
            table.iter().find(|(known, _)| *known == path).map(|&(_, endpoint)| endpoint)
        };
        let bare = path.strip_prefix("/v1").unwrap_or(path);
        find(POSTS, bare)
            .or_else(|| find(NATIVE_POSTS, path))
            .or_else(|| kserve_path(path).map(|(_, endpoint)| endpoint))
            .unwrap_or(Self::Other)
    }

    /// The words spoken there. [`Other`](Self::Other) is [`Dialect::Plain`]: the caller may know the
    /// dialect of the pool.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::ChatCompletions
            | Self::Completions
            | Self::Responses
            | Self::Embeddings
            | Self::Rerank
            | Self::Score
            | Self::Classify
            | Self::Moderations
            | Self::Tokenize
            | Self::Detokenize
            | Self::Models => Dialect::OpenAi,
            Self::AnthropicMessages | Self::CountTokens => Dialect::Anthropic,
            Self::OllamaChat | Self::OllamaGenerate | Self::OllamaEmbed => Dialect::Ollama,
            Self::LlamaCompletion | Self::Infill => Dialect::LlamaCpp,
            Self::Generate | Self::GenerateStream => Dialect::Tgi,
            Self::KserveInfer | Self::KserveGenerate | Self::KserveGenerateStream => Dialect::Kserve,
            Self::GrpcInfer => Dialect::Grpc,
            Self::Other => Dialect::Plain,
        }
    }

    /// Whether the request asks a model for something: a pure function of its body, unless
    /// [`RequestFacts::stateful`](super::RequestFacts::stateful) says otherwise, and so replayable.
    pub fn is_inference(self) -> bool {
        !matches!(self, Self::Models | Self::Other)
    }

    /// Whether an answer in one piece is JSON.
    pub fn answers_json(self) -> bool {
        !matches!(self, Self::GrpcInfer | Self::Other)
    }

    /// Whether a 200 with an empty body is no answer (F13).
    pub fn must_have_body(self) -> bool {
        self != Self::Other
    }

    /// Whether it writes text, so that the answer may be a stream of tokens.
    pub fn generates(self) -> bool {
        match self {
            Self::ChatCompletions
            | Self::Completions
            | Self::Responses
            | Self::AnthropicMessages
            | Self::OllamaChat
            | Self::OllamaGenerate
            | Self::LlamaCompletion
            | Self::Infill
            | Self::Generate
            | Self::GenerateStream
            | Self::KserveGenerate
            | Self::KserveGenerateStream => true,
            Self::Embeddings
            | Self::Rerank
            | Self::Score
            | Self::Classify
            | Self::Moderations
            | Self::Tokenize
            | Self::Detokenize
            | Self::CountTokens
            | Self::OllamaEmbed
            | Self::KserveInfer
            | Self::GrpcInfer
            | Self::Models
            | Self::Other => false,
        }
    }

    /// The shape of what it generates; OpenAI's for endpoints that generate nothing.
    pub(super) fn stream_shape(self) -> Shape {
        match self {
            Self::Responses => Shape::Responses,
            Self::AnthropicMessages => Shape::Anthropic,
            Self::OllamaChat | Self::OllamaGenerate => Shape::Ollama,
            Self::LlamaCompletion | Self::Infill | Self::Generate | Self::GenerateStream => Shape::Native,
            Self::KserveGenerate | Self::KserveGenerateStream => Shape::Kserve,
            _ => Shape::OpenAi,
        }
    }

    /// Name in metrics and logs.
    pub fn class(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::Classify => "classify",
            Self::Moderations => "moderations",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
            Self::AnthropicMessages => "messages",
            Self::CountTokens => "count_tokens",
            Self::OllamaChat => "ollama_chat",
            Self::OllamaGenerate => "ollama_generate",
            Self::OllamaEmbed => "ollama_embed",
            Self::LlamaCompletion => "llamacpp_completion",
            Self::Infill => "infill",
            Self::Generate => "generate",
            Self::GenerateStream => "generate_stream",
            Self::KserveInfer => "kserve_infer",
            Self::KserveGenerate => "kserve_generate",
            Self::KserveGenerateStream => "kserve_generate_stream",
            Self::GrpcInfer => "grpc_infer",
            Self::Models => "models",
            Self::Other => "other",
        }
    }

    /// The model that the path names (KServe).
    pub fn model_in_path(path: &str) -> Option<&str> {
        kserve_path(path).map(|(model, _)| model)
    }
}

/// `/v2/models/{model}[/versions/{version}]/{infer|generate|generate_stream}`, `/v1/models/{model}:predict`.
fn kserve_path(path: &str) -> Option<(&str, Endpoint)> {
    if let Some(model) = path.strip_prefix("/v1/models/").and_then(|rest| rest.strip_suffix(":predict")) {
        return Some((model, Endpoint::KserveInfer));
    }
    let (model, rest) = path.strip_prefix("/v2/models/")?.split_once('/')?;
    let action = match rest.strip_prefix("versions/") {
        Some(versioned) => versioned.split_once('/')?.1,
        None => rest,
    };
    let endpoint = match action {
        "infer" => Endpoint::KserveInfer,
        "generate" => Endpoint::KserveGenerate,
        "generate_stream" => Endpoint::KserveGenerateStream,
        _ => return None,
    };
    Some((model, endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_known_with_and_without_v1() {
        for (path, endpoint) in [
            ("/v1/chat/completions", Endpoint::ChatCompletions),
            ("/chat/completions", Endpoint::ChatCompletions),
            ("/v1/completions", Endpoint::Completions),
            ("/v1/responses", Endpoint::Responses),
            ("/v1/embeddings", Endpoint::Embeddings),
            ("/rerank", Endpoint::Rerank),
            ("/v2/rerank", Endpoint::Rerank),
            ("/v1/messages", Endpoint::AnthropicMessages),
            ("/v1/messages/count_tokens", Endpoint::CountTokens),
            ("/api/chat", Endpoint::OllamaChat),
            ("/completion", Endpoint::LlamaCompletion),
            ("/generate", Endpoint::Generate),
            ("/generate_stream", Endpoint::GenerateStream),
            ("/v2/models/resnet/infer", Endpoint::KserveInfer),
            ("/v2/models/resnet/versions/3/infer", Endpoint::KserveInfer),
            ("/v2/models/llm/generate_stream", Endpoint::KserveGenerateStream),
            ("/v1/models/resnet:predict", Endpoint::KserveInfer),
            ("/inference.GRPCInferenceService/ModelInfer", Endpoint::GrpcInfer),
            ("/inference.GRPCInferenceService/ModelStreamInfer", Endpoint::Other),
            ("/v1/files", Endpoint::Other),
            ("/v1/generate", Endpoint::Other),
            ("/v1/chat/completions/", Endpoint::Other),
            ("/v1/load_lora_adapter", Endpoint::Other),
            ("/v1/responses/resp_1/cancel", Endpoint::Other),
            ("/v2/models/resnet/load", Endpoint::Other),
        ] {
            assert_eq!(Endpoint::of(&Method::POST, path), endpoint, "{path}");
        }
    }

    #[test]
    fn only_a_post_infers() {
        assert_eq!(Endpoint::of(&Method::GET, "/v1/models"), Endpoint::Models);
        assert_eq!(Endpoint::of(&Method::GET, "/v1/models/org/name"), Endpoint::Models);
        assert_eq!(Endpoint::of(&Method::GET, "/v1/modelsx"), Endpoint::Other);
        assert_eq!(Endpoint::of(&Method::GET, "/v1/chat/completions"), Endpoint::Other);
        assert_eq!(Endpoint::of(&Method::DELETE, "/v1/responses"), Endpoint::Other);
        assert!(!Endpoint::Models.is_inference());
    }

    #[test]
    fn kserve_names_its_model_in_the_path() {
        assert_eq!(Endpoint::model_in_path("/v2/models/resnet/infer"), Some("resnet"));
        assert_eq!(Endpoint::model_in_path("/v2/models/resnet/versions/3/infer"), Some("resnet"));
        assert_eq!(Endpoint::model_in_path("/v1/models/resnet:predict"), Some("resnet"));
        assert_eq!(Endpoint::model_in_path("/v1/chat/completions"), None);
    }

    #[test]
    fn metrics_have_a_name_for_every_path() {
        let mut names = std::collections::BTreeMap::new();
        let v1 = POSTS.iter().map(|&(path, endpoint)| (path, endpoint));
        for (path, endpoint) in v1.chain(NATIVE_POSTS.iter().copied()) {
            let name = endpoint.class();
            assert!(
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'),
                "{path}"
            );
            assert_eq!(*names.entry(name).or_insert(endpoint), endpoint, "two endpoints are called {name}");
        }
        assert_eq!(Endpoint::ChatCompletions.class(), "chat_completions");
        assert_eq!(Endpoint::Other.class(), "other");
    }
}
