;; A filter between Envoy and an engine that lets the head of an answer wait for the first byte of its body.
;; Engines answer a stream's head when they accept it, seconds before the first token. Envoy tries another
;; engine only as long as it has seen no head; behind this filter, as long as there is no token.
;; Proxy-Wasm ABI 0.2.1; 0 continues, 1 waits. envoy.py carries it translated (`wasmtime.wat2wasm`, base64).
(module
  (memory (export "memory") 1)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 0))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_context_create") (param i32 i32))
  ;; context, number of headers, whether the answer ends here
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (i32.eqz (local.get 2)))
  ;; context, bytes, whether the answer ends here
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
    (i32.eqz (i32.or (local.get 1) (local.get 2)))))
