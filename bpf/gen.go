package bpf

// Needs clang-14, llvm-strip-14, libbpf-dev and linux-libc-dev of Debian 12 on
// amd64; other versions give other bytes.

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel,bpfeb -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type mode -type slot -type pod -type role -type listener -type counter -type counters -type flow -type probe -type exemption Capture capture.c
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel,bpfeb -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" Lookup lookup.c
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel,bpfeb -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type report -type outcome Sockets sockets.c
//go:generate sh -c "sha256sum *.c *.h >sources.sum"
